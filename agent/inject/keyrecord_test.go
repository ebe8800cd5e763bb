package inject

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

func FuzzKeyRecord(f *testing.F) {
	f.Add([]byte(`{"users":{"alice":["` + testKey(1, "x") + `"]}}`))
	f.Add([]byte(`{"users":{"../x":[]}}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		rec, err := parseKeyRecord(data)
		if err != nil {
			return
		}
		for user, lines := range rec.Users {
			if CheckUser(user) != nil {
				t.Errorf("user %q", user)
			}
			for _, l := range lines {
				if CheckKey(l, false) != nil {
					t.Errorf("line %q", l)
				}
			}
		}
		again, err := json.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseKeyRecord(again); err != nil {
			t.Errorf("what is written is not read: %v", err)
		}
	})
}

// FuzzKeyEdit holds that an edit leaves every other line as it is, whatever
// else is in the file.
func FuzzKeyEdit(f *testing.F) {
	a, b := testKey(1, "a"), testKey(2, "b")
	f.Add("# x\n" + a + "\n" + b)
	f.Add("\x00\n\n  " + a + "  \r\nno-pty " + a + "\n")
	f.Add("")
	f.Fuzz(func(t *testing.T, old string) {
		out, done := keyEdit{add: []string{b}, remove: []string{a}}.apply([]byte(old))
		lines := slices.Collect(strings.Lines(string(out)))
		removed, hasB := 0, false
		i := 0
		for line := range strings.Lines(old) {
			if keyOf(line) == keyOf(a) {
				removed++
				continue
			}
			hasB = hasB || keyOf(line) == keyOf(b)
			if i == len(lines) || strings.TrimSuffix(lines[i], "\n") != strings.TrimSuffix(line, "\n") {
				t.Fatalf("line %q is not where it was in %q", line, lines)
			}
			i++
		}
		rest := lines[i:]
		if hasB && (len(rest) != 0 || len(done.added) != 0) || !hasB && (len(rest) != 1 || rest[0] != b+"\n" || len(done.added) != 1) {
			t.Errorf("added %q, said %q", rest, done.added)
		}
		if done.removed != removed {
			t.Errorf("removed %d, said %d", removed, done.removed)
		}
	})
}
