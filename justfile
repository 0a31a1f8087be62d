# Every recipe is plain bash: without `just`, copy its lines.

# a virtual environment with speedrl in it
setup:
    python3 -m venv .venv
    .venv/bin/pip install -e ".[test]"

test:
    .venv/bin/python -m pytest -q

# lint and types
check:
    .venv/bin/ruff check .
    .venv/bin/mypy --strict speedrl/method
    .venv/bin/mypy speedrl

# the generated pages and tables: options, and results of experiments/results
docs:
    .venv/bin/python -m experiments.docs

# the documentation as a site in site/, which needs no network
site:
    .venv/bin/pip install -e ".[docs]"
    NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# the first image of README.md; `just before-after --model runs/train --seed 0 --out docs/before_after.png`
before-after *options:
    .venv/bin/python -m experiments.before_after {{options}}

# trainings killed at 50 random moments, each resumed: minutes
kill:
    SPEEDRL_KILLS=50 .venv/bin/python -m pytest -q tests/test_state.py tests/test_distributed.py -k killed

# `just train --iterations 200`
train *options:
    .venv/bin/speedrl train --steps-reward 0.5 {{options}}

# every ablation of the paper and its report; `just ablate kl --seeds 0,1,2,3,4`, `just ablate --quick`
ablate *options:
    .venv/bin/speedrl ablate {{options}}

# an ablation in full: its file in experiments/results/ablations, and the pages made of it; many hours on two cores.
# All trainings start from the base with one searched sampler; it is saved without guidance, so the reference's is given.
# Not for the ablation search: `speedrl ablate search`.
results name *options:
    test -d runs/searched/model || .venv/bin/speedrl train --iterations 0 --no-compare --out runs/searched
    .venv/bin/speedrl ablate {{name}} --model runs/searched --beside embedded --out runs/results \
        --prompts speedrl/models/embedded/prompts/train.txt --set search=0 --set reference_guidance=1.5 \
        {{ if name =~ "speed-reward|likelihood|method" { "" } else if name =~ "remask|train-steps" { "--set steps_reward=0.5" } else { "--set steps_reward=4" } }} \
        --jobs 2 --eval-steps 1,2,4,8,16,32 --eval-count 2 {{options}}
    cp runs/results/report-{{name}}/{{name}}.json experiments/results/ablations/
    .venv/bin/python -m experiments.docs

# quality and time of the embedded model over step counts
eval *options:
    .venv/bin/speedrl eval --model embedded --out runs/eval {{options}}

# speed against the machine's ceilings, diffusers' pipeline and a plain iteration: an hour and more, nothing else running
bench *options:
    .venv/bin/python -m experiments.bench {{options}}

# our scores against the packages image-reward and hpsv2, with random weights at real size: minutes, 20 GB of memory
parity:
    python3 -m venv .venv-reference
    .venv-reference/bin/pip install -e ".[reference]"
    SPEEDRL_REAL_SIZE=1 .venv-reference/bin/python -m pytest -q -s tests/test_reward_parity.py
    .venv-reference/bin/python -m experiments.scorers

# the embedded model from the packages that its images come from: hours; see experiments/embedded/README.md
rebuild *options:
    .venv/bin/pip install -e ".[rebuild]"
    .venv/bin/python -m experiments.embedded {{options}}

# what the rebuilt model can do, and its card: an hour and more
card *options:
    .venv/bin/python -m experiments.embedded.measure {{options}}
    .venv/bin/python -m experiments.embedded.card
