"""Posts without one of their modalities."""

from pathlib import Path

from distill.evaluation.modalities import without_each
from distill.task.sample import Media, Sample

CLIP, PICTURE = Path("clip.mp4"), Path("a.png")


def test_each_modality_of_the_posts_is_removed_alone() -> None:
    posts = [Sample("a", "words", (PICTURE,), label=1.0, video=CLIP, audio=CLIP), Sample("b", "only words", label=2.0)]
    found = dict(without_each(posts))
    assert list(found) == ["text", "images", "video", "audio"]
    full = Media((PICTURE,), CLIP, CLIP)
    assert [(post.text, post.media) for post in found["text"]] == [("", full), ("", Media())]
    assert found["images"][0].media == Media((), CLIP, CLIP)
    assert found["video"][0].media == Media((PICTURE,), None, CLIP), "its sound is still heard"
    assert found["audio"][0].media == Media((PICTURE,), CLIP, None)
    assert all(found[name][1] == posts[1] for name in ("images", "video", "audio"))
    assert all([post.label for post in each] == [1.0, 2.0] for each in found.values())


def test_posts_of_one_modality_have_nothing_to_remove() -> None:
    assert dict(without_each([Sample("a", "words")])) == {}
    assert list(dict(without_each([Sample("a", "words"), Sample("b", "", (PICTURE,))]))) == ["text", "images"]
