from benchmarks import tables


def test_tables_come_from_the_committed_results():
    """Every figure between the README's table marks is what the newest result files say."""
    text = (tables.ROOT / "README.md").read_text()
    for name, make in tables.TABLES.items():
        inside = text.split(f"<!-- table: {name} -->\n")[1].split("\n<!-- end -->")[0]
        assert inside.splitlines() == make()
