package imds

import (
	"os"
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
