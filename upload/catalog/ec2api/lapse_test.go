package ec2api_test

import (
	"encoding/base64"
	"fmt"
	"testing"
	"time"

	"github.com/instar-image/instar/upload/catalog/tasks"
)

// bundle is what asks for a bundle of an instance.
func bundle(instance string) []string {
	return []string{"InstanceId", instance, "Storage.S3.Bucket", "alice-1", "Storage.S3.Prefix", "web"}
}

// take has an agent take the only task that waits for it.
func (w *world) take(instance string) tasks.Task {
	w.t.Helper()
	waiting, _, err := w.tasks.Waiting(w.t.Context(), instance)
	if err != nil || len(waiting) != 1 {
		w.t.Fatalf("waiting: %v, %v", waiting, err)
	}
	mine, err := w.tasks.Take(w.t.Context(), waiting[0], "agent")
	if err != nil {
		w.t.Fatal(err)
	}
	return mine
}

// TestTasksLapse: no bundle task stays for ever, and the instance can be asked anew.
func TestTasksLapse(t *testing.T) {
	w := newWorld(t)
	state := func(id, state, code string) {
		t.Helper()
		if r := w.want("", alice, "DescribeBundleTasks", "BundleId.1", id); r.first("state") != state || r.first("code") != code {
			t.Errorf("it is %s %s, want %s %s", r.first("state"), r.first("code"), state, code)
		}
	}
	id := w.want("", alice, "BundleInstance", bundle("i-a1")...).first("bundleId")
	w.now = w.now.Add(tasks.Lifetime)
	state(id, "failed", "Client.InstanceUnreachable")
	w.want("IncorrectState", alice, "CancelBundleTask", "BundleId", id)

	id = w.want("", alice, "BundleInstance", bundle("i-a1")...).first("bundleId")
	mine := w.take("i-a1")
	w.now = w.now.Add(tasks.Silence)
	state(id, "bundling", "")
	w.want("BundlingInProgress", alice, "BundleInstance", bundle("i-a1")...)
	w.now = w.now.Add(time.Second)
	state(id, "failed", "Server.AgentSilent")
	if _, err := w.tasks.Update(t.Context(), mine, tasks.Status{State: tasks.Complete}); err == nil {
		t.Error("what was told to have failed is complete after all")
	}
	w.want("", alice, "BundleInstance", bundle("i-a1")...)
}

// TestImagesWhoseAgentFails: the reason is the agent's, or that it is silent.
func TestImagesWhoseAgentFails(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	silent := w.want("", alice, "CreateImage", "InstanceId", "i-a1", "Name", "of one that is silent").first("imageId")
	w.take("i-a1")
	w.now = w.now.Add(tasks.Silence + time.Second)
	refused := w.want("", alice, "CreateImage", "InstanceId", "i-a2", "Name", "of one that will not").first("imageId")
	waiting, _, err := w.tasks.Waiting(ctx, "i-a2")
	if err != nil || len(waiting) != 1 {
		t.Fatalf("waiting: %v, %v", waiting, err)
	}
	if err := w.tasks.Refuse(ctx, waiting[0], "agent", "Client.NotPermitted", "not here"); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]string{silent: "Server.AgentSilent", refused: "Client.NotPermitted"} {
		if r := w.want("", alice, "DescribeImages", "ImageId.1", id); r.first("imageState") != "failed" || r.first("code") != want {
			t.Errorf("%s %s, want %s", r.first("imageState"), r.first("code"), want)
		}
	}
}

// TestWithdrawnImages: who deregisters an image before it is there has its task
// cancelled, taken or not.
func TestWithdrawnImages(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	for instance, want := range map[string]tasks.State{"i-a1": tasks.Cancelled, "i-a2": tasks.Cancelling, "i-a3": tasks.Pending} {
		id := w.want("", alice, "CreateImage", "InstanceId", instance, "Name", "of "+instance).first("imageId")
		if instance == "i-a2" {
			w.take(instance)
		}
		if instance != "i-a3" {
			w.want("", alice, "DeregisterImage", "ImageId", id)
		}
		if err := w.api.Settle(ctx); err != nil {
			t.Fatal(err)
		}
		if l, err := w.tasks.List(ctx, instance); err != nil || len(l) != 1 || l[0].State != want {
			t.Errorf("%s: %v, %v; want %s", instance, l, err, want)
		}
	}
}

// TestPolicyEnds: a bundle is not begun when its upload policy has expired.
func TestPolicyEnds(t *testing.T) {
	w := newWorld(t)
	end := w.now.Add(10 * time.Minute)
	policy := fmt.Sprintf(`{"expiration":%q,"conditions":[{"acl":"ec2-bundle-read"},{"bucket":"alice-1"},["starts-with","$key","web"]]}`, end.Format(time.RFC3339))
	id := w.want("", alice, "BundleInstance", append(bundle("i-a1"), "Storage.S3.UploadPolicy", base64.StdEncoding.EncodeToString([]byte(policy)), "Storage.S3.UploadPolicySignature", "c2ln")...).first("bundleId")
	w.now = end.Add(-time.Second)
	if l, _, err := w.tasks.Waiting(t.Context(), "i-a1"); err != nil || len(l) != 1 || !l[0].Expires.Equal(end) {
		t.Errorf("%v, %v", l, err)
	}
	w.now = end
	if l, _, err := w.tasks.Waiting(t.Context(), "i-a1"); err != nil || len(l) != 0 {
		t.Errorf("%v, %v", l, err)
	}
	if r := w.want("", alice, "DescribeBundleTasks", "BundleId.1", id); r.first("code") != "Client.InstanceUnreachable" {
		t.Errorf("it is\n%s", r.Body)
	}
}
