"""What both sides share: configuration, records, wire, tasks, metrics, processes. Loads neither torch nor vllm."""
