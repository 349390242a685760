"""DeepSpeed ZeRO. Open `engine` first; `shards` has all that is read of DeepSpeed beyond its documented interface."""
