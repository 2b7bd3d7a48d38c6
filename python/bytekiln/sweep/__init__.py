"""Many runs as one piece of work: what is asked, who claims a run, what came of it."""
