"""What every other room may use: errors, files, the machine, pictures, and parts that other packages register."""
