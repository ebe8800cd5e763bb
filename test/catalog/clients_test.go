package catalog

import (
	"encoding/json"
	"strings"
	"testing"
)

// TestBoto3 lets boto3 drive every action with every parameter its model has,
// once, and holds every answer to the model.
func TestBoto3(t *testing.T) {
	w := newWorld(t)
	location := w.bundle(t, "web")
	out := w.run(t, w.clean("INSTAR_LOCATION="+location, "INSTAR_BUCKET="+w.bucket, "INSTAR_OTHER="+other), "/usr/bin/python3", drive(t))
	var report struct {
		Calls   int
		Actions map[string]int
	}
	if err := json.Unmarshal([]byte(out[strings.LastIndexByte(strings.TrimSpace(out), '\n')+1:]), &report); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%d calls of %d actions", report.Calls, len(report.Actions))
	if report.Calls < 150 || len(report.Actions) < 30 {
		t.Errorf("only %d calls of %d actions", report.Calls, len(report.Actions))
	}
}
