"""The commands: each is a function of its module, whose parameters are the flags."""

from __future__ import annotations

import typer

from pipeboost.cli.bench import run_bench
from pipeboost.cli.demo import run_demo
from pipeboost.cli.doctor import print_diagnosis
from pipeboost.cli.flags import GenerateCommand, generate, with_acceleration
from pipeboost.cli.plan import print_plan
from pipeboost.cli.serve import PREFIX, ServeCommand, run_serve
from pipeboost.cli.tune import run_tune
from pipeboost.cli.verify import run_verify
from pipeboost.cli.warm import run_warm

app = typer.Typer(
    help="pipeboost: one line gives a stock Diffusers pipeline the speed of a dedicated engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(cls=GenerateCommand)(with_acceleration(generate))
app.command("serve", cls=ServeCommand, context_settings={"auto_envvar_prefix": PREFIX})(with_acceleration(run_serve))
app.command("demo")(run_demo)
app.command("plan")(with_acceleration(print_plan))
app.command("doctor")(print_diagnosis)
app.command("verify")(with_acceleration(run_verify))
app.command("tune")(run_tune)
app.command("warm")(with_acceleration(run_warm))
app.command("bench")(run_bench)
