"""The list of sounds in the web application's page: several at once, kept over a reload, links to moments."""

import json

import pytest
from support.web_page import choose_files, load_sound, open_page, until
from support.web_site import RATE, wav

pytest.importorskip("uvicorn", reason="needs the extra [web]")


@pytest.fixture
def clips(example):
    """Short sounds by their names."""
    return {f"{name}.wav": wav(example[RATE * 4 * n : RATE * (4 * n + 2)]) for n, name in enumerate("abc")}


def read_rows(page):
    """Return the words of each row of the list."""
    rows = page.locator("#sounds .entry").all()
    return [[row.locator(f".{part}").inner_text() for part in ("name", "length", "text")] for row in rows]


def wait_for_answers(page, count):
    """Wait until so many sounds have an answer, `scene 12 % · object 3 %`."""
    condition = "row => row.textContent.includes('%')"
    until(page, f"[...document.querySelectorAll('#sounds .text')].filter({condition}).length == {count}")


def count_uploads(page):
    """Return a list that grows with each sound that is sent."""
    uploads = []
    page.on("request", lambda request: uploads.append(request.url) if request.method == "POST" else None)
    return uploads


def test_several_files_are_analyzed_and_a_bad_one_fails_alone(page, site, clips):
    open_page(page, site)
    names = list(clips)
    choose_files(page, {names[0]: clips[names[0]], "bad.wav": b"no sound"} | clips)
    wait_for_answers(page, 3)
    page.wait_for_selector("#sounds .failed")
    rows = read_rows(page)
    assert [row[0] for row in rows] == ["a.wav", "bad.wav", "b.wav", "c.wav"]
    assert [row[1] for row in rows] == ["2.0 s", "", "2.0 s", "2.0 s"]
    assert rows[1][2].startswith("cannot be decoded")
    assert page.inner_text("#name") == "a.wav"
    assert page.locator("#error").is_hidden()
    page.click("#sounds .entry >> nth=1")
    assert page.inner_text("#error").startswith("bad.wav: cannot be decoded")
    assert page.locator("#results").is_hidden()
    page.click("#sounds .entry >> nth=3")
    assert page.locator("#error").is_hidden()
    assert page.inner_text("#name") == "c.wav"
    assert page.get_attribute("#sounds .entry >> nth=3", "aria-current") == "true"
    assert page.inner_text("#now-scenes .label >> nth=0") in rows[3][2]
    page.get_by_role("button", name="Remove c.wav").click()
    assert page.inner_text("#name") == "b.wav"
    assert page.evaluate("document.activeElement.querySelector('.name').textContent") == "b.wav"
    assert [row[0] for row in read_rows(page)] == ["a.wav", "bad.wav", "b.wav"]


def test_sounds_are_kept_over_a_reload_until_they_are_cleared(page, site, clips):
    open_page(page, site)
    choose_files(page, clips | {"bad.wav": b"no sound"})
    wait_for_answers(page, 3)
    page.wait_for_selector("#sounds .failed")
    page.click("#sounds .entry >> nth=1")
    before = read_rows(page)
    uploads = count_uploads(page)
    page.reload()
    page.wait_for_selector("#downloads:not([hidden])")
    assert read_rows(page) == before[:3]  # nothing is kept of what failed
    assert page.inner_text("#name") == "b.wav"
    assert len(uploads) == 1  # for units and downloads of the one that is shown
    page.click("#clear")
    assert page.locator("#queue").is_hidden()
    until(page, "document.body.classList.contains('empty')")
    page.reload()
    page.wait_for_selector("#track-scenes", state="attached")
    page.wait_for_timeout(100)
    assert page.locator("#queue").is_hidden()


def test_results_of_another_network_are_not_kept_but_their_files(page, site, clips):
    open_page(page, site)
    choose_files(page, clips)
    wait_for_answers(page, 3)
    network = site.get("/network") | {"sha256": "another"}
    page.route("**/network", lambda route: route.fulfill(body=json.dumps(network)))
    uploads = count_uploads(page)
    page.reload()
    wait_for_answers(page, 3)
    assert len(uploads) == 3


def test_the_page_works_where_nothing_can_be_kept(page, site, clips):
    page.add_init_script("indexedDB.open = () => { throw new Error('not allowed'); }")
    open_page(page, site)
    until(page, "document.querySelector('#kept').textContent.startsWith('not kept')")
    choose_files(page, clips)
    wait_for_answers(page, 3)
    page.reload()
    page.wait_for_selector("#track-scenes", state="attached")
    page.wait_for_timeout(100)
    assert page.locator("#queue").is_hidden()


@pytest.mark.parametrize(
    "put",
    [
        "throw new DOMException('full', 'QuotaExceededError')",  # at once, or at the end of the transaction
        "const kept = put.call(this, record); kept.onsuccess = () => this.transaction.abort(); return kept",
    ],
)
def test_the_list_says_which_sounds_have_no_room_in_the_browser(page, site, clips, put):
    open_page(page, site)
    choose_files(page, {"a.wav": clips["a.wav"]})
    wait_for_answers(page, 1)
    page.evaluate(
        f"""() => {{
          const {{ put }} = IDBObjectStore.prototype;
          IDBObjectStore.prototype.put = function (record) {{ {put}; }};
        }}"""
    )
    choose_files(page, {"b.wav": clips["b.wav"]})
    wait_for_answers(page, 2)
    texts = [row[2].endswith(" · not kept: no room") for row in read_rows(page)]
    assert texts == [False, True]
    page.reload()
    wait_for_answers(page, 1)
    assert [row[0] for row in read_rows(page)] == ["a.wav"]
    # the link is to the one that is not kept
    assert page.inner_text("#error") == "The linked sound is not kept in this browser."
    assert page.locator("#results").is_hidden()
    page.click("#sounds .entry")
    page.wait_for_selector("#downloads:not([hidden])")
    page.evaluate("location.hash = '#sound=another'")
    until(page, "!document.querySelector('#error').hidden")
    assert page.locator("#results").is_hidden()


def test_a_link_leads_to_a_moment(page, site, example):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    load_sound(page, site, wav(example), "first.wav")
    page.evaluate("document.querySelector('#media').currentTime = 12.5")
    until(page, "location.hash.endsWith('&t=12.5')")
    page.click("#link")
    until(page, "document.querySelector('#link').textContent == 'Copied'")
    link = page.evaluate("navigator.clipboard.readText()")
    load_sound(page, site, wav(example[: 3 * RATE]), "second.wav")
    assert page.url != link
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector("#downloads:not([hidden])")
    assert page.inner_text("#name") == "first.wav"
    until(page, "document.querySelector('#time').textContent == '12.5 / 25.0 s'")
    page.evaluate("location.hash = '#t=3'")
    until(page, "document.querySelector('#time').textContent == '3.0 / 25.0 s'")


def test_the_server_holds_few_sounds_that_were_analyzed(page, site, example):
    deleted = []
    page.on("request", lambda request: deleted.append(request.url) if request.method == "DELETE" else None)
    open_page(page, site)
    choose_files(page, {f"{number}.wav": wav(example[: RATE // 4]) for number in range(12)})
    wait_for_answers(page, 12)
    page.wait_for_timeout(50)
    assert len(deleted) == 1  # of those that are not shown all but ten
    with page.expect_request(lambda request: request.method == "POST"):
        page.click("#sounds .entry >> nth=1")
    page.wait_for_selector("#downloads:not([hidden])")


def test_sounds_can_be_tried_again_once_the_server_is_back(chromium, site, clips):
    page = chromium.new_page()  # whose console reports the failure
    open_page(page, site)
    page.route("**/sounds?name=*", lambda route: route.abort())
    choose_files(page, clips)
    until(page, "document.querySelectorAll('#sounds .failed').length == 3")
    assert page.inner_text("#error").startswith("The server does not respond.")
    page.unroute("**/sounds?name=*")
    page.click("#sounds .entry >> nth=0")  # which is the one that is shown
    page.wait_for_selector("#downloads:not([hidden])")
    assert page.locator("#error").is_hidden()
    page.reload()
    wait_for_answers(page, 3)
    page.close()


def lose(page):
    """Delete the sound that is shown from the server, unknown to the page."""
    link = "document.querySelector('#downloads a').href.replace('/results.json', '')"
    page.evaluate(f"fetch({link}, {{ method: 'DELETE' }})")


def test_a_sound_that_the_server_has_lost_is_sent_again(chromium, site, clips):
    page = chromium.new_page()  # whose console reports status 404
    open_page(page, site)
    choose_files(page, clips)
    wait_for_answers(page, 3)
    lose(page)
    page.click("#sounds .entry >> nth=1")
    page.wait_for_selector("#downloads:not([hidden])")
    with page.expect_request(lambda request: request.method == "POST"):
        page.click("#sounds .entry >> nth=0")
    page.wait_for_selector("#downloads:not([hidden])")
    assert page.locator("#error").is_hidden()
    for layer in ("conv2", "conv3"):  # as often as it is lost
        page.wait_for_timeout(200)  # until its pictures are drawn, too
        lose(page)
        with page.expect_request(lambda request: request.method == "POST"):
            page.select_option("#layer", layer)
        page.wait_for_selector("#downloads:not([hidden])")
        assert page.locator("#error").is_hidden()
    page.close()
