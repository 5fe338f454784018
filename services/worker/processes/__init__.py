"""Engine processes as the worker has them: forked, fed with adapters, watched."""
