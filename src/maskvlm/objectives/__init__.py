"""What is learned and how it is measured: tasks, masking, losses."""
