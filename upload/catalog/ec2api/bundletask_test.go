package ec2api_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

func TestBundleTasks(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	to := []string{"InstanceId", "i-a1", "Storage.S3.Bucket", "alice-1", "Storage.S3.Prefix", "web"}
	w.want("DryRunOperation", alice, "BundleInstance", append(to, "DryRun", "true")...)
	w.want("InvalidInstanceID.NotFound", bob, "BundleInstance", to...)
	w.want("AuthFailure", alice, "BundleInstance", "InstanceId", "i-a1", "Storage.S3.Bucket", "bob-1", "Storage.S3.Prefix", "web")
	r := w.want("", alice, "BundleInstance", to...)
	id := r.first("bundleId")
	if r.first("state") != "pending" || r.first("bucket") != "alice-1" || r.first("instanceId") != "i-a1" {
		t.Errorf("the task is\n%s", r.Body)
	}
	w.want("BundlingInProgress", alice, "BundleInstance", to...)
	w.want("InvalidBundleId.NotFound", bob, "DescribeBundleTasks", "BundleId.1", id)
	if r := w.want("", bob, "DescribeBundleTasks"); r.first("bundleId") != "" {
		t.Errorf("bob sees\n%s", r.Body)
	}
	waiting, _, err := w.tasks.Waiting(ctx, "i-a1")
	if err != nil || len(waiting) != 1 {
		t.Fatalf("waiting: %v, %v", waiting, err)
	}
	mine, err := w.tasks.Take(ctx, waiting[0], "agent")
	if err != nil {
		t.Fatal(err)
	}
	if mine, err = w.tasks.Update(ctx, mine, tasks.Status{State: tasks.Storing, Progress: 42}); err != nil {
		t.Fatal(err)
	}
	if r := w.want("", alice, "DescribeBundleTasks", "Filter.1.Name", "state", "Filter.1.Value.1", "stor*"); r.first("progress") != "42%" {
		t.Errorf("while it is stored:\n%s", r.Body)
	}
	if r := w.want("", alice, "CancelBundleTask", "BundleId", id); r.first("state") != "cancelling" {
		t.Errorf("cancelled:\n%s", r.Body)
	}
	if _, err := w.tasks.Update(ctx, mine, tasks.Status{State: tasks.Cancelled}); err != nil {
		t.Fatal(err)
	}
	if r := w.want("", alice, "DescribeBundleTasks", "BundleId.1", id); r.first("state") != "failed" || r.first("code") != "Client.Cancelled" {
		t.Errorf("at the end:\n%s", r.Body)
	}
	w.want("IncorrectState", alice, "CancelBundleTask", "BundleId", id)
}

// TestTooManyTasks: an instance is not asked without end, and what others have it
// do is not told.
func TestTooManyTasks(t *testing.T) {
	w := newWorld(t)
	for i := range 15 {
		w.want("", alice, "CreateImage", "InstanceId", "i-a1", "Name", fmt.Sprintf("image %d", i))
	}
	others, err := w.tasks.Submit(t.Context(), tasks.Request{Kind: tasks.BundleInstance, Instance: "i-a1", Account: bob, Bucket: "bob-1", Prefix: "p"})
	if err != nil {
		t.Fatal(err)
	}
	if r := w.want("BundlingInProgress", alice, "BundleInstance", "InstanceId", "i-a1", "Storage.S3.Bucket", "alice-1", "Storage.S3.Prefix", "web"); strings.Contains(r.Body, others.ID) {
		t.Errorf("another's task is named:\n%s", r.Body)
	}
	w.want("RequestLimitExceeded", alice, "CreateImage", "InstanceId", "i-a1", "Name", "image 16")
	w.want("", alice, "CreateImage", "InstanceId", "i-a2", "Name", "image 16")
	w.now = w.now.Add(tasks.Lifetime) // nobody does them any more
	w.want("", alice, "CreateImage", "InstanceId", "i-a1", "Name", "image 17")
	w.want("FilterLimitExceeded", alice, "DescribeTags", "Filter.1.Name", "key", "Filter.1.Value.1", strings.Repeat("a", 8193))
}

// TestTooMuchOfAnAccount: an account asks for no more than others can wait for, whatever
// instances and images it makes up, and others are not kept from theirs.
func TestTooMuchOfAnAccount(t *testing.T) {
	w, location, _ := newBucketWorld(t)
	m := w.want("", alice, "RegisterImage", "ImageLocation", location, "Name", "web")
	image := between(m.Body, "<imageId>", "</imageId>")
	for i := range 3 {
		w.want("", alice, "CopyImage", "Name", fmt.Sprintf("copy %d", i), "SourceImageId", image, "SourceRegion", region)
	}
	w.want("RequestLimitExceeded", alice, "CopyImage", "Name", "copy 4", "SourceImageId", image, "SourceRegion", region)
	w.want("RequestLimitExceeded", alice, "CreateStoreImageTask", "ImageId", image, "Bucket", "alice-in")
	for i := range 4 {
		w.want("", alice, "CreateImage", "InstanceId", fmt.Sprintf("i-a%d", i), "Name", fmt.Sprintf("image %d", i))
	}
	w.want("RequestLimitExceeded", alice, "CreateImage", "InstanceId", "i-a9", "Name", "image 9")
	w.want("RequestLimitExceeded", alice, "BundleInstance", "InstanceId", "i-a9", "Storage.S3.Bucket", "alice-1", "Storage.S3.Prefix", "web")
	w.want("", bob, "CreateImage", "InstanceId", "i-b1", "Name", "image")
	w.now = w.now.Add(tasks.Lifetime) // nobody does them any more
	w.want("", alice, "CreateImage", "InstanceId", "i-a9", "Name", "image 9")
}

func between(s, before, after string) string {
	_, s, _ = strings.Cut(s, before)
	s, _, _ = strings.Cut(s, after)
	return s
}

// TestSettleGoesOn: an image that cannot be completed, and a status that is none,
// keep no other image from its end, and old tasks are forgotten all the same.
func TestSettleGoesOn(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	ids := map[string]string{}
	for _, i := range []string{"i-a1", "i-a2", "i-a3"} {
		ids[i] = w.want("", alice, "CreateImage", "InstanceId", i, "Name", "of "+i).first("imageId")
	}
	end := func(instance string, s tasks.Status) {
		t.Helper()
		waiting, _, err := w.tasks.Waiting(ctx, instance)
		if err != nil || len(waiting) != 1 {
			t.Fatalf("waiting: %v, %v", waiting, err)
		}
		mine, err := w.tasks.Take(ctx, waiting[0], "agent")
		if err == nil {
			_, err = w.tasks.Update(ctx, mine, s)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	l, err := w.tasks.List(ctx, "i-a1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := upload.PutBytes(ctx, w.store, tasks.Prefix+"i-a1/"+l[0].ID+"/status", []byte("{"), upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	// What the agent names is not in the store.
	end("i-a2", tasks.Status{State: tasks.Complete, Manifest: "i-a2@" + strings.Repeat("0", 64)})
	end("i-a3", tasks.Status{State: tasks.Failed, Code: "no code", Message: "no room"})
	if err := w.api.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	state := func(i string) string {
		t.Helper()
		r := w.want("", alice, "DescribeImages", "ImageId.1", ids[i])
		return r.first("imageState") + " " + r.first("code")
	}
	for i, want := range map[string]string{"i-a1": "pending ", "i-a2": "failed Client.InvalidManifest", "i-a3": "failed Server.InternalError"} {
		if got := state(i); got != want {
			t.Errorf("the image of %s is %s, want %s", i, got, want)
		}
	}
	w.now = w.now.Add(tasks.Lifetime + tasks.Keep)
	if err := w.api.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	if got := state("i-a1"); got != "failed Server.InternalError" {
		t.Errorf("the image whose task nobody can read is %s", got)
	}
	if l, err := w.tasks.List(ctx, ""); err != nil || len(l) != 0 {
		t.Errorf("%d tasks are left, %v", len(l), err)
	}
	if _, err := w.store.Stat(ctx, tasks.Prefix+"i-a1/"+l[0].ID+"/request"); !errors.Is(err, upload.ErrNotExist) {
		t.Errorf("the task nobody can read is still there: %v", err)
	}
}
