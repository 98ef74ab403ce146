def run(names, seconds):
    return 0
