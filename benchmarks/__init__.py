"""The shared harness: run the scripts on suites of tasks, collect their curves, report, compare.

suites.py   what to run: the TOML files in suites/, and the hash of what a script computes
engine.py   where a run's process lives (local processes; the place for a cluster's engine)
runner.py   a suite's runs: skip, resume, retry, time limit, failures
live.py     the table on the terminal
results.py  a run's directory -> one line of results/{suite}.jsonl
stats.py    interquartile mean, stratified bootstrap, probability of improvement
groups.py   lines -> groups of seeds, missing seeds, published results, normalised scores
report.py   groups -> tables (report.md, report.csv, README section); plots.py: pictures
compare.py  two result sets -> better, worse, or cannot tell
peers.py    the same task with Stable-Baselines3
speed.py    steps per second beside the peer's, in pairs
step_sizes.py  the demonstration of the step-size problem, on reinforce.py
"""
