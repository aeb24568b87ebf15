def test_x(finished):
    import json
    for k,v in json.load(open(finished.folder / 'chain.json'))['stages'].items(): print(k,v['status'],v['seconds'],v['peak_memory_mb'])
    print((finished.folder / "annotate/summary.json").read_text())
    print((finished.folder / "augment/summary.json").read_text())
    print((finished.folder / "evaluate/metrics.json").read_text())
    print((finished.folder / "teacher/metrics.csv").read_text())
