"""What both sides share: configuration, records, the wire, tasks, metrics and processes. Loads neither torch nor vllm."""
