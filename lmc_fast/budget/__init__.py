"""What a run needs: memory, disk and time, from the shapes alone, and what it really took."""
