"""W4A8 of a text encoder, and one epoch of quantization-aware training in which the float model is the teacher."""

import torch

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from zoo import minilm, rows, sentences

WEIGHT = QuantSpec(format="int4", granularity="group", group_size=32)
INPUT = QuantSpec(format="int8", granularity="token", dynamic=True)
config = QuantConfig(rules=(Rule(select="linear", scheme=Scheme(weight=WEIGHT, input=INPUT)),))

torch.manual_seed(0)
teacher, held_out = minilm(), rows(sentences(32, seed=1), 8)
lessons = rows(sentences(1280, seed=0, length=48, single=True), 4)
prepared = graphq.prepare(teacher, config, kwargs=lessons[0], target="simulation", dynamic_shapes="batch+sequence")
calibrated = graphq.calibrate(prepared, lessons[:8], progress=False)
print(f"W4A8 after calibration      {graphq.compare(teacher, calibrated, held_out).sqnr:.2f} dB", flush=True)

student = graphq.qat(calibrated, scales="lsq")
optimizer = torch.optim.Adam(student.parameters(), 4e-5)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-5, total_steps=len(lessons))
for batch in lessons:
    with torch.no_grad():
        wanted = teacher(**batch)
    found, words = student(**batch), batch["attention_mask"][..., None]
    hidden = ((found.last_hidden_state - wanted.last_hidden_state) * words).square().sum() / (384 * words.sum())
    loss = hidden + (found.pooler_output - wanted.pooler_output).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()

trained = graphq.compare(teacher, graphq.convert(student), held_out).sqnr
print(f"… and one epoch of training {trained:.2f} dB, on articles that neither has seen")
