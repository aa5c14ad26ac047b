"""The ablation study (Table 4): what the model is worth without its posterior, its losses L_D and L_C, and its energy.

    python -m miracle_jax.ablation --config configs/tiny.py --workdir runs/ablation [--train.steps 500 ...]
        [-- --judges judges --language-model NAME ...]

Trains the config four times, whole and without each part, in folders of WORKDIR, and evaluates them in one table, in
WORKDIR/evaluation; what comes after `--` are flags of `python -m miracle_jax.evaluate`. The same command again goes on
where it stopped. Every row takes the refitted heads, since without L_C there are no others, and rows that differ in two
things would say nothing about either.
"""

from dataclasses import replace
from pathlib import Path

from miracle_jax import cluster, evaluate
from miracle_jax.command_line import parse
from miracle_jax.config import Config
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.judge import Judges
from miracle_jax.train import read_command, train

WITHOUT = {"posterior": {"posterior": False}, "gap": {"gap": 0.0}, "classify": {"classify": 0.0}}
"""Part -> the fields of config.Loss that leave it out: the posterior, L_D and L_C."""


def whole(config: Config) -> Config:
    """The config with refitted heads."""
    return replace(config, sample=replace(config.sample, heads="refit"))


def without(part: str, config: Config) -> Config:
    """The same without a part of WITHOUT."""
    return replace(whole(config), loss=replace(config.loss, **WITHOUT[part]))


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        argv = cluster.join(argv)
        end = argv.index("--") if "--" in argv else len(argv)
        command = "python -m miracle_jax.ablation"
        config, workdir = read_command(command, __doc__, argv[:end])
        if not config.train.refit_epochs:
            raise UserError("train.refit_epochs is 0, but every row of the ablation takes the refitted heads")
        configs = {"miracle": whole(config)} | {f"no_{part}": without(part, config) for part in WITHOUT}
        folder = Path(workdir).expanduser()
        options = {}
        for name, own in configs.items():
            variants = "energy" if name == "miracle" else "none"
            default = evaluate.Options(variants=variants, out=str(folder / "evaluation"), sample=own.sample)
            default = replace(default, decode=own.decode)
            options[name] = parse(
                default, argv[end + 1 :], f"{command} --config FILE --workdir DIR --", evaluate.__doc__
            )
        runs = {name: str(folder / name) for name in configs}
        evaluate.check(runs, options)
        if judges := options["miracle"].judges:
            Judges(judges)  # read again after the trainings; what is wrong with them is to be known before
        for name, own in configs.items():
            print(f"---- {name}", flush=True)
            train(own, folder / name)
        evaluate.report(runs, options)


if __name__ == "__main__":
    main()
