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
			w.storedTags(t, out)
			if report.Calls < 150 || len(report.Actions) < 30 {
				t.Errorf("only %d calls of %d actions and waiters", report.Calls, len(report.Actions))
			}
		})
	}
}

// storedTags looks at the object that a client had an image stored as: it has the
// tags and the metadata that were asked for.
func (w *world) storedTags(t *testing.T, out string) {
	t.Helper()
	for line := range strings.Lines(out) {
		words := strings.Fields(line)
		if len(words) != 3 || words[0] != "STORED" {
			continue
		}
		url := w.minio.Endpoint + "/" + words[1] + "/" + words[2]
		curl := []string{"curl", "-sS", "--fail", "--noproxy", "*", "--user", w.minio.AccessKey + ":" + w.minio.SecretKey, "--aws-sigv4", "aws:amz:" + w.minio.Region + ":s3"}
		if got := w.run(t, w.clean(), append(curl, url+"?tagging=")...); !strings.Contains(got, "<Tag><Key>keep</Key><Value>10 years</Value></Tag>") {
			t.Errorf("the object's tags are %s", got)
		}
		if got := w.run(t, w.clean(), append(curl, "-I", url)...); !strings.Contains(strings.ToLower(got), "x-amz-meta-ami-name: of a bundle") {
			t.Errorf("the object's metadata is %s", got)
		}
		return
	}
	t.Error("nothing was stored")
}
