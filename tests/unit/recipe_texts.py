"""Recipe files that several tests start from."""

MINIMAL = """\
name: small
policy: {model: some/model}
verifiers:
  - {kind: noise, name: coin}
"""

FULL = """\
name: full
seed: 3
policy:
  model: some/model
  dtype: float32
  lora: {r: 8, target_modules: [q_proj, v_proj]}
prompts:
  source: questions.jsonl
  answer_column: answer
sampling:
  samples_per_prompt: 4
  engine: {enforce_eager: true, kv: [1, 2.5, null]}
verifiers:
  - kind: format
    name: shape
    pattern: '\\d+'
  - kind: length
    name: brief.one
    maximum: 20
training:
  learning_rate: 1e-5
  loss: {beta: .5}
  adam_betas: [0.9, 1]
evaluation:
  gold: {kind: answer, name: gold}
"""
