package catalog

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

const (
	sdkModule = "../catalogsdk"
	sdkRecord = "../../upload/catalog/ec2api/testdata/sdk.jsonl"
)

// TestSDK: the requests that TestSDKReplay of upload/catalog/ec2api has answered
// are of the SDK that test/catalogsdk is made with. If $INSTAR_RECORD names a file,
// that program is compiled, which takes minutes, drives the servers with the SDK,
// and records its requests there. A new record, after a change of the program or
// of what the servers answer:
//
//	INSTAR_RECORD=$PWD/upload/catalog/ec2api/testdata/sdk.jsonl go test -timeout 1h -run '^TestSDK$' ./test/catalog
func TestSDK(t *testing.T) {
	if record := os.Getenv("INSTAR_RECORD"); record != "" {
		sdkRun(t, record)
	}
	data, err := os.ReadFile(sdkRecord)
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(data), "\n")
	var of struct{ SDK, Version string }
	if err := json.Unmarshal([]byte(first), &of); err != nil {
		t.Fatal(err)
	}
	mod, err := os.ReadFile(filepath.Join(sdkModule, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	if of.SDK == "" || !strings.Contains(string(mod), "\t"+of.SDK+" "+of.Version+"\n") {
		t.Errorf("the record is of %s %s, test/catalogsdk is made with another: record anew", of.SDK, of.Version)
	}
}

func sdkRun(t *testing.T, record string) {
	w := newWorld(t)
	files, err := filepath.Glob("../../bundle/ec2/testdata/fixtures/ec2-full/*")
	if err != nil || len(files) < 3 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		w.minio.Put(t, w.bucket, "bundles/"+filepath.Base(f), b)
	}
	program := w.path("catalogsdk")
	build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", program, ".")
	build.Dir = sdkModule
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building test/catalogsdk: %v\n%s", err, out)
	}
	w.obey(t)
	t.Log(w.run(t, w.clean(), program, "-url", w.url, "-url2", w.url2, "-region", region, "-other", other,
		"-bucket", w.bucket, "-bucket2", w.bucket2, "-location", w.bucket+"/bundles/web-1.0.manifest.xml", "-record", record))
}

// obey is an agent of the instance i-agent: what it is to bundle is complete at
// once, and an image is never made.
func (w *world) obey(t *testing.T) {
	t.Helper()
	trust, err := keys.ReadAllowedSigners(w.path("signers"))
	if err != nil {
		t.Fatal(err)
	}
	q := tasks.Open(tasks.Options{Store: w.open(t).Objects(), Signers: trust})
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	t.Cleanup(func() { stop(); wg.Wait() })
	wg.Go(func() {
		for ; ctx.Err() == nil; time.Sleep(300 * time.Millisecond) {
			waiting, _, err := q.Waiting(ctx, "i-agent")
			for _, task := range waiting {
				end := tasks.Status{State: tasks.Complete, Progress: 100, Manifest: task.Bucket + "/" + task.Prefix + ".manifest.xml"}
				if task.Kind == tasks.CreateImage {
					end = tasks.Status{State: tasks.Failed, Code: "Client.NoSpace", Message: "the disk is full"}
				}
				var mine tasks.Task
				if mine, err = q.Take(ctx, task, "agent"); err == nil {
					_, err = q.Update(ctx, mine, end)
				}
			}
			if err != nil && ctx.Err() == nil {
				t.Errorf("the agent: %v", err)
			}
		}
	})
}
