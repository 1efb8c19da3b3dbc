"""What methods that store weights in few bits share: forms, errors carried on, reports."""
