package catalog

import (
	"encoding/json"
	"strings"
	"testing"
)

// TestClients lets boto3 and the AWS command line drive every action with every
// parameter their model has, once, and holds every answer to the model.
func TestClients(t *testing.T) {
	for _, client := range []string{"boto3", "cli"} {
		t.Run(client, func(t *testing.T) {
			t.Parallel() // they wait for their stores most of the time
			w := newWorld(t)
			location := w.bundle(t, "web")
			out := w.run(t, w.clean("INSTAR_CLIENT="+client, "INSTAR_LOCATION="+location, "INSTAR_BUCKET="+w.bucket, "INSTAR_OTHER="+other), "/usr/bin/python3", drive(t))
			out = strings.TrimSpace(out)
			var report struct {
				Calls   int
				Actions map[string]int
			}
			if err := json.Unmarshal([]byte(out[strings.LastIndexByte(out, '\n')+1:]), &report); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			t.Logf("%d calls of %d actions and waiters", report.Calls, len(report.Actions))
			if report.Calls < 150 || len(report.Actions) < 30 {
				t.Errorf("only %d calls of %d actions and waiters", report.Calls, len(report.Actions))
			}
		})
	}
}
