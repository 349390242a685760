"""Images and labels: where they come from (sources) and how they reach the device (memory, folder)."""
