"""Loading and inspecting models: a student, its backbone and its head (`student`); its linear layers (`linears`), how
a layer uses its weight (`weight_use`) and which cannot have a delta (`unfit`); stacked experts (`experts`); attention
over packed examples (`packed_attention`); gradient checkpointing (`checkpointing`); quantised loading (`quantised`);
GGUF files (`gguf_files`); hub ids (`names`).
"""
