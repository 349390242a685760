"""DeepSpeed ZeRO. Open `engine` first; `shards` has all access to undocumented DeepSpeed internals."""
