package launch_test

import (
	"encoding/json"
	"strings"
	"testing"
)

// TestRecordTrace boots a Debian from MinIO with its reads recorded: it becomes
// the image's boot trace, signed, and the next version is laid out by it.
func TestRecordTrace(t *testing.T) {
	t.Parallel()
	store, env := image(t)
	_, pub := sshKey(t)
	out, errs, status := run(t, env, append([]string{
		"launch", "web", "--record-trace", "--record-for", "1", "--ssh-key", pub, "--memory", "768", "--accel", "tcg", "--scratch", t.TempDir(), "--json",
	}, store...)...)
	if status != 0 {
		t.Fatalf("exit status %d\n%s%s", status, out, errs)
	}
	if !strings.Contains(out, `"message_type":"trace"`) {
		t.Errorf("no trace: %s", out)
	}
	show := func() (ranges int, bytes int64) {
		t.Helper()
		out, errs, status := run(t, env, append([]string{"images", "trace", "web", "--json"}, store...)...)
		var x struct {
			Ranges int
			Bytes  int64
		}
		if err := json.Unmarshal([]byte(out), &x); status != 0 || err != nil {
			t.Fatalf("images trace: exit status %d, %v\n%s%s", status, err, out, errs)
		}
		return x.Ranges, x.Bytes
	}
	ranges, bytes := show()
	t.Logf("a boot reads %d bytes in %d ranges", bytes, ranges)
	if ranges < 50 || bytes < 5<<20 || bytes > 200<<20 {
		t.Errorf("a boot reads %d bytes in %d ranges", bytes, ranges)
	}
	out, errs, status = run(t, env, append([]string{"create-image", "-v", debian(t, "plain"), "--all", "-s", "512", "-n", "web", "-r", "x86_64", "--boot-trace", "web", "--json"}, store...)...)
	if status != 0 && status != 24 {
		t.Fatalf("create-image: exit status %d\n%s%s", status, out, errs)
	}
	if _, again := show(); again < bytes/2 || again > bytes {
		t.Errorf("%d bytes are in the new version's trace, %d were", again, bytes)
	}
}
