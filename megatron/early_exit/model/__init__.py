"""GPT and Llama models with exits, of Megatron-Core's layers; their losses."""
