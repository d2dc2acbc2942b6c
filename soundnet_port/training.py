"""Training SoundNet as the paper did: from teachers who saw what was filmed, to a student who hears it.

Teachers give, for every 5 s of a sound, a distribution over the categories of a head. Three forms of
data are read:

**A manifest**, a text file in UTF-8 named `*.tsv`, tab-separated, with a header:

    sound           objects              scenes
    clips/a.mp3     labels/a.objects.npy labels/a.scenes.npy
    clips/b.wav     labels/b.objects.npy labels/b.scenes.npy

The first column is a sound file of any format that `load_audio` reads. Every other column is a
teacher, named by its head, `objects` or `scenes`; more teachers for a head are told apart by what
comes after a colon (`objects:vit`). Each head has a teacher at least. Paths are relative to the
manifest's folder. A label file is an array in NumPy's format (version 1 or later, no pickle) of
float32, float16 or float64 and of the shape (steps, categories): row `k` is the teacher's distribution
for the seconds 5k to 5k + 5, it sums to 1. `steps` is 1 or more, the same for all teachers of a sound;
`categories` is the same for all teachers of a head and all sounds. Names of the categories, a line
each and in the order of the outputs, may stand beside the manifest in `objects.categories.txt` and
`scenes.categories.txt`; the trained weights get them.

**WebDataset shards**, `.tar` files with `KEY.mp3` (or any other suffix of a sound), `KEY.objects.npy`,
`KEY.scenes.npy` (`KEY.objects:vit.npy`) for every sound, the same arrays; category names may stand
beside the shards.

**The released Flickr data** as MIT published them: see `Release`.
"""
