from benchmarks.quality import five_bytes


def test_the_plot_has_every_contender_at_the_bytes_of_its_training():
    found = five_bytes.points(five_bytes.RESULTS / "best", "gpt2")
    assert {name: round(size) for name, (size, _) in found.items()} == {
        "adamw": 16,
        "outer, 8 bits": 9,
        "adamw, bfloat16 to nearest": 8,
        "outer, 8 bits, bfloat16": 5,
        "outer, 8 bits, bfloat16 to nearest": 5,
    }
    assert found["adamw"][1].mean == 0
    figure = five_bytes.draw(five_bytes.RESULTS)
    drawn = {panel.get_title(): len(panel.containers) for panel in figure.axes}
    assert drawn == {
        "GPT-2, AdamW's best rate": 5,
        "Llama, AdamW's best rate": 5,
        "GPT-2, a third of it": 5,
        "Llama, a third of it": 4,
    }
