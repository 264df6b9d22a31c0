"""The ``vllm`` backend: an engine beside each worker process, for generation and for scoring."""
