"""Everything with state, devices or disks: optimizer, mesh, checkpoints, metrics, the loop."""
