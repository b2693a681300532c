"""What the machine is asked for: files written whole, run folders, processes, signals, devices."""
