package imds

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestDocs runs the manual's first lines, from nothing to curl.
func TestDocs(t *testing.T) {
	manual, err := os.ReadFile("../../docs/metadata.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(manual), "```sh\nmake build\n")
	script, _, closed := strings.Cut(after, "\n```\n")
	if !ok || !closed {
		t.Fatal("docs/metadata.md no longer begins with a script")
	}
	script = strings.NewReplacer("./instar ", instar+" ", "/tmp/md", t.TempDir(), " &\n", " &\nuntil curl -so /dev/null http://127.0.0.1:8080; do sleep 0.1; done\n").Replace(script)
	ns := newNetns(t) // its port 8080 is free
	out := ns.run(t, nil, "bash", "-ec", "trap 'kill %1; wait' EXIT\n"+script)
	for _, want := range []string{"1 instances, no mistakes", "public-keys/", "ssh-ed25519 AAAA", "i-0123456789abcdef0\t127.0.0.1\tweb-1.example.org"} {
		if !strings.Contains(out, want) {
			t.Errorf("the manual's script does not print %q:\n%s", want, out)
		}
	}
}

// TestUnit checks the systemd units that come with the program, and how far the
// service is locked in.
func TestUnit(t *testing.T) {
	units := t.TempDir()
	for _, name := range []string{"instar-metadata.service", "instar-metadata.socket", "instar-cache.service", "instar-catalog.service"} {
		text, err := os.ReadFile("../../docs/systemd/" + name)
		if err != nil {
			t.Fatal(err)
		}
		// The program is where the unit says only once it is installed.
		if err := os.WriteFile(filepath.Join(units, name), bytes.ReplaceAll(text, []byte("/usr/local/bin/instar"), []byte(instar)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"instar-metadata.service", "instar-cache.service", "instar-catalog.service"} {
		out := sh(t, "systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", filepath.Join(units, name))
		_, level, ok := strings.Cut(out, "Overall exposure level for "+name+": ")
		var exposure float64
		if _, err := fmt.Sscan(level, &exposure); !ok || err != nil || exposure > 2 {
			t.Errorf("%s: exposure %q, want at most 2.0", name, strings.TrimSpace(level))
		}
		t.Logf("%s: exposure %.1f", name, exposure)
	}
	for _, name := range []string{"instar-metadata.service", "instar-metadata.socket", "instar-cache.service", "instar-catalog.service"} {
		verify := exec.Command("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", filepath.Join(units, name))
		out, err := verify.CombinedOutput()
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, units) || strings.Contains(line, name) {
				t.Errorf("%s: %s (%v)", name, line, err)
			}
		}
	}
}
