"""pi, the policy: one optimizer step over Megatron-Core ranks; the only home of megatron."""
