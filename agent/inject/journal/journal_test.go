package journal

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func open(t *testing.T, dir string) *Journal {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	j, err := Open(d)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestStepsAreBegunOnce(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir)
	check(t, j.Begin("i-1", "a"))
	check(t, j.End("i-1", "a", false, ""))
	check(t, j.Begin("i-1", "b"))
	check(t, j.End("i-1", "b", true, "exit status 3"))
	check(t, j.Begin("i-1", "c"))
	check(t, j.Close())

	j = open(t, dir)
	defer j.Close()
	for step, want := range map[string]State{"a": Finished, "b": Failed, "c": Interrupted, "d": ""} {
		if got := j.State("i-1", step); got != want {
			t.Errorf("step %s is %q, want %q", step, got, want)
		}
		if err := j.Begin("i-1", step); (want == "") != (err == nil) || (err != nil && !errors.Is(err, ErrDone)) {
			t.Errorf("beginning %s: %v", step, err)
		}
	}
	// Another instance starts afresh.
	check(t, j.Begin("i-2", "a"))
}

// TestPowerCuts cuts the file at every byte that may be lost: all after the
// last sync. A step whose start was durable is never begun again.
func TestPowerCuts(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "journal")
	j := open(t, dir)
	size := func() int {
		st, err := os.Stat(name)
		check(t, err)
		return int(st.Size())
	}
	check(t, j.Begin("i-1", "a"))
	begun := size()
	check(t, j.End("i-1", "a", false, ""))
	ended := size()
	check(t, j.Close())
	whole, err := os.ReadFile(name)
	check(t, err)
	for cut := range ended + 1 {
		check(t, os.WriteFile(name, whole[:cut], 0o600))
		j := open(t, dir)
		want := State("")
		switch {
		case cut == ended:
			want = Finished
		case cut >= begun:
			want = Interrupted
		}
		if got := j.State("i-1", "a"); got != want {
			t.Errorf("cut at %d: %q, want %q", cut, got, want)
		}
		if err := j.Begin("i-1", "a"); (err == nil) != (cut < begun) {
			t.Errorf("cut at %d: beginning again: %v", cut, err)
		}
		check(t, j.Close())
		// And the file can be read once more.
		check(t, open(t, dir).Close())
	}
}

func TestDamage(t *testing.T) {
	for _, text := range []string{
		"rubbish\n",
		`{"time":"2026-01-01T00:00:00Z","instance":"i","step":"s","state":"done"}` + "\n",
		`{"time":"2026-01-01T00:00:00Z","instance":"i","state":"started"}` + "\n",
		`{"time":"2026-01-01T00:00:00Z","instance":"i","step":"s","state":"started","x":1}` + "\n",
		"\x00\x00\x00\n",
		strings.Repeat("\n", 3),
	} {
		dir := t.TempDir()
		check(t, os.WriteFile(filepath.Join(dir, "journal"), []byte(text), 0o600))
		d, err := os.Open(dir)
		check(t, err)
		if _, err := Open(d); !errors.Is(err, ErrDamaged) {
			t.Errorf("%q: %v", text, err)
		}
		d.Close()
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"time":"2026-01-01T00:00:00Z","instance":"i","step":"s","state":"started"}` + "\n{"))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		records, torn, err := parse(data)
		if err != nil {
			return
		}
		if torn > 0 && data[len(data)-1] == '\n' {
			t.Error("a whole last line counts as torn")
		}
		for _, r := range records {
			if r.Instance == "" || r.Step == "" || r.State == "" {
				t.Errorf("record %+v", r)
			}
		}
	})
}

func TestReadWaitsForNobody(t *testing.T) {
	dir := t.TempDir()
	look := func() View {
		d, err := os.Open(dir)
		check(t, err)
		defer d.Close()
		v, err := Read(d)
		check(t, err)
		return v
	}
	if v := look(); v.Busy || len(v.Records) > 0 {
		t.Errorf("no journal: %+v", v)
	}
	j := open(t, dir)
	check(t, j.Begin("i-1", "a"))
	check(t, j.End("i-1", "a", false, ""))
	check(t, j.Begin("i-1", "b"))
	check(t, j.Begin("i-2", "a"))
	states := func(v View) string {
		var out []string
		for _, r := range v.Last("i-1") {
			out = append(out, r.Step+" "+string(r.State))
		}
		return strings.Join(out, ", ")
	}
	if v := look(); !v.Busy || states(v) != "a finished, b started" {
		t.Errorf("while it is open: busy %v, %s", v.Busy, states(v))
	}
	check(t, j.Close())
	before, err := os.ReadFile(filepath.Join(dir, "journal"))
	check(t, err)
	check(t, os.WriteFile(filepath.Join(dir, "journal"), append(before, "{torn"...), 0o600))
	if v := look(); v.Busy || states(v) != "a finished, b interrupted" {
		t.Errorf("after its end: busy %v, %s", v.Busy, states(v))
	}
	after, err := os.ReadFile(filepath.Join(dir, "journal"))
	if err != nil || string(after) != string(before)+"{torn" {
		t.Error("looking changed the journal")
	}
}
