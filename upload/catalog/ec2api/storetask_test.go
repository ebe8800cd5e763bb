package ec2api_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/ec2api"
	"github.com/instar-image/instar/upload/catalog/stored"
)

// newBucketWorld is a world with buckets, which are directories, and a bundle in
// one of them.
func newBucketWorld(t *testing.T) (w *world, location, buckets string) {
	t.Helper()
	w = newWorld(t)
	buckets = t.TempDir()
	for _, b := range []string{"alice-in", "alice-out", "bob-in"} {
		if err := os.Mkdir(filepath.Join(buckets, b), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.CopyFS(filepath.Join(buckets, "alice-in", "web"), os.DirFS("../../../bundle/ec2/testdata/fixtures/ec2-full")); err != nil {
		t.Fatal(err)
	}
	clock := func() time.Time { return w.now }
	var err error
	w.catalog, err = catalog.Open(w.store, catalog.Options{
		Trust: w.trust, Signer: w.signer, Now: clock, Folder: "alice-out",
		Bucket: func(_ context.Context, bucket string) (upload.Store, error) {
			s, err := upload.OpenDir(filepath.Join(buckets, bucket), false)
			if err != nil {
				return nil, &upload.Error{Op: "open", Store: bucket, Kind: upload.ErrNoBucket, Err: err}
			}
			return s, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	accounts := filepath.Join(t.TempDir(), "accounts.yaml")
	if err := os.WriteFile(accounts, []byte(accountsYAML), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := ec2api.ReadAccounts(accounts)
	if err != nil {
		t.Fatal(err)
	}
	w.api, err = ec2api.New(ec2api.Options{Catalog: w.catalog, Accounts: func() *ec2api.Accounts { return a }, Region: region, Tasks: w.tasks, Now: clock, MaxTasks: 4, MaxImages: 3})
	if err != nil {
		t.Fatal(err)
	}
	return w, "alice-in/web/web-1.0.manifest.xml", buckets
}

// work lets the server do what was begun, until the question is answered so.
func (w *world) work(t *testing.T, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.api.Work(ctx, 10*time.Millisecond, func(err error) { t.Error(err) })
	}()
	deadline := time.Now().Add(2 * time.Minute)
	for !done() {
		if time.Now().After(deadline) {
			t.Error("it was not done")
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	<-ended
}

// TestStoreImageTasks: an image is stored as one object and restored, by requests.
func TestStoreImageTasks(t *testing.T) {
	w, location, buckets := newBucketWorld(t)
	id := w.want("", alice, "RegisterImage", "Name", "web", "ImageLocation", location).first("imageId")
	key := w.want("", alice, "CreateStoreImageTask", "ImageId", id, "Bucket", "alice-out").first("objectKey")
	if key != id+".bin" {
		t.Fatalf("the object is %q", key)
	}
	r := w.want("", alice, "DescribeStoreImageTasks")
	for name, want := range map[string]string{
		"amiId": id, "bucket": "alice-out", "s3objectKey": key, "storeTaskState": "InProgress", "progressPercentage": "0", "taskStartTime": "2026-11-22T12:00:00.000Z",
	} {
		if got := r.first(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if _, err := os.Stat(filepath.Join(buckets, "alice-out", key)); err == nil {
		t.Error("there is an object already")
	}
	w.want("", alice, "CreateStoreImageTask", "ImageId", id, "Bucket", "alice-out") // an answer was lost
	w.work(t, func() bool {
		return w.want("", alice, "DescribeStoreImageTasks", "ImageId.1", id).first("storeTaskState") == "Completed"
	})
	if r := w.want("", alice, "DescribeStoreImageTasks", "Filter.1.Name", "task-state", "Filter.1.Value.1", "Completed"); r.first("progressPercentage") != "100" || len(r.all("amiId")) != 1 {
		t.Errorf("it is %s", r.Body)
	}
	w.want("DryRunOperation", alice, "CreateRestoreImageTask", "Bucket", "alice-out", "ObjectKey", key, "Name", "again", "DryRun", "true")
	again := w.want("", alice, "CreateRestoreImageTask", "Bucket", "alice-out", "ObjectKey", key, "Name", "again", "TagSpecification.1.ResourceType", "image",
		"TagSpecification.1.Tag.1.Key", "k", "TagSpecification.1.Tag.1.Value", "v").first("imageId")
	if r := w.want("", alice, "DescribeImages", "ImageId.1", again); r.first("imageState") != "pending" || r.first("sourceImageId") != id || r.first("sourceImageRegion") != region {
		t.Errorf("it is %s", r.Body)
	}
	w.work(t, func() bool {
		return w.want("", alice, "DescribeImages", "ImageId.1", again).first("imageState") == "available"
	})
	if _, err := os.Stat(filepath.Join(buckets, "alice-out", "bundles", again, "web-1.0.part.07")); err != nil {
		t.Error(err)
	}
	for _, c := range []struct {
		code, who, action string
		pairs             []string
	}{
		{"AuthFailure", alice, "CreateStoreImageTask", []string{"ImageId", id, "Bucket", "bob-in"}},
		{"UnauthorizedOperation", alice, "CreateStoreImageTask", []string{"ImageId", id, "Bucket", "bob-in", "DryRun", "true"}},
		{"UnauthorizedOperation", "KEYREADER", "CreateStoreImageTask", []string{"ImageId", id, "Bucket", "alice-out"}},
		{"DryRunOperation", alice, "CreateStoreImageTask", []string{"ImageId", id, "Bucket", "alice-out", "DryRun", "true"}},
		{"InvalidAMIID.NotFound", bob, "CreateStoreImageTask", []string{"ImageId", id, "Bucket", "bob-in"}},
		{"InvalidS3Bucket.NotFound", alice, "CreateStoreImageTask", []string{"ImageId", id, "Bucket", "alice-none"}},
		{"MissingParameter", alice, "CreateStoreImageTask", []string{"ImageId", id}},
		{"InvalidParameter", alice, "CreateStoreImageTask", []string{"ImageId", id, "Bucket", "alice-out", "S3ObjectTag.1.Key", "a", "S3ObjectTag.2.Key", "a"}},
		{"InvalidParameterValue", alice, "CreateStoreImageTask", []string{"ImageId", id, "Bucket", "alice-out/x", "S3ObjectTag.1.Key", "a"}}, // a directory
		{"AuthFailure", bob, "CreateRestoreImageTask", []string{"Bucket", "alice-out", "ObjectKey", key}},
		{"InvalidParameterValue", alice, "CreateRestoreImageTask", []string{"Bucket", "alice-out", "ObjectKey", "none"}},
		{"InvalidParameterValue", alice, "CreateRestoreImageTask", []string{"Bucket", "alice-out", "ObjectKey", "../alice-in/web/web-1.0.manifest.xml"}},
		{"InvalidParameterValue", alice, "CreateRestoreImageTask", []string{"Bucket", "alice-in", "ObjectKey", "web/web-1.0.manifest.xml"}},
		{"InvalidAMIName.Duplicate", alice, "CreateRestoreImageTask", []string{"Bucket", "alice-out", "ObjectKey", key}},
		{"InvalidAMIName.Malformed", alice, "CreateRestoreImageTask", []string{"Bucket", "alice-out", "ObjectKey", key, "Name", "a"}},
		{"MissingParameter", alice, "CreateRestoreImageTask", []string{"Bucket", "alice-out"}},
		{"InvalidParameterCombination", alice, "DescribeStoreImageTasks", []string{"ImageId.1", id, "MaxResults", "5"}},
		{"InvalidParameterValue", alice, "DescribeStoreImageTasks", []string{"MaxResults", "201"}},
		{"InvalidAMIID.Malformed", alice, "DescribeStoreImageTasks", []string{"ImageId.1", "x"}},
		{"InvalidParameterValue", alice, "DescribeStoreImageTasks", []string{"Filter.1.Name", "state", "Filter.1.Value.1", "x"}},
	} {
		w.want(c.code, c.who, c.action, c.pairs...)
	}
	if r := w.want("", bob, "DescribeStoreImageTasks"); r.first("amiId") != "" {
		t.Errorf("bob is told %s", r.Body)
	}
	w.now = w.now.Add(catalog.StoreTaskLife + time.Hour)
	if r := w.want("", alice, "DescribeStoreImageTasks"); r.first("amiId") != "" {
		t.Errorf("what ended long ago: %s", r.Body)
	}
}

// TestBundleOverRegistered: a bundle does not take the place of one that is
// registered, nor is one registered whose place a bundle is about to take.
func TestBundleOverRegistered(t *testing.T) {
	w, location, _ := newBucketWorld(t)
	bundle := []string{"InstanceId", "i-a1", "Storage.S3.Bucket", "alice-in/web", "Storage.S3.Prefix", "web-1.0"}
	id := w.want("", alice, "RegisterImage", "Name", "web", "ImageLocation", location).first("imageId")
	w.want("OperationNotPermitted", alice, "BundleInstance", bundle...)
	w.want("OperationNotPermitted", alice, "BundleInstance", append([]string{"DryRun", "true"}, bundle...)...)
	w.want("", alice, "DeregisterImage", "ImageId", id)
	w.want("DryRunOperation", alice, "BundleInstance", append([]string{"DryRun", "true"}, bundle...)...)
	task := w.want("", alice, "BundleInstance", bundle...).first("bundleId")
	w.want("InvalidManifest", alice, "RegisterImage", "Name", "web", "ImageLocation", location)
	w.want("", alice, "CancelBundleTask", "BundleId", task)
	w.want("", alice, "RegisterImage", "Name", "web", "ImageLocation", location)
	for _, bucket := range []string{"..", "alice-in/..", "."} {
		if r := w.as(alice, "BundleInstance", "InstanceId", "i-a2", "Storage.S3.Bucket", bucket, "Storage.S3.Prefix", "p"); r.Code != "InvalidParameterValue" {
			t.Errorf("the bucket %s: %s", bucket, r.Body)
		}
	}
}

// TestUploadPolicies: what a policy forbids is not asked for, however it is written.
func TestUploadPolicies(t *testing.T) {
	w, _, _ := newBucketWorld(t)
	for conditions, want := range map[string]string{
		`{"acl":"ec2-bundle-read"},{"bucket":"alice-in"},["starts-with","$key","p"]`:             "DryRunOperation",
		`["eq","$acl","ec2-bundle-read"],["eq","$bucket","alice-in"],["starts-with","$key","p"]`: "DryRunOperation",
		`["starts-with","$bucket","alice"],["starts-with","$Content-Type",""]`:                   "DryRunOperation",
		`{"bucket":"bob-in"}`:                        "AuthFailure",
		`{"Bucket":"bob-in"}`:                        "AuthFailure",
		`["eq","$bucket","bob-in"]`:                  "AuthFailure",
		`["EQ","$Bucket","bob-in"]`:                  "AuthFailure",
		`["starts-with","$bucket","bob"]`:            "AuthFailure",
		`["starts-with","$key","other"]`:             "AuthFailure",
		`["eq","$key","p"]`:                          "AuthFailure",
		`{"key":"p"}`:                                "AuthFailure",
		`["content-length-range",1,100]`:             "InvalidParameterValue",
		`{"x-amz-server-side-encryption":"aws:kms"}`: "InvalidParameterValue",
		`["like","$key","p"]`:                        "InvalidParameterValue",
		`{"bucket":5}`:                               "InvalidParameterValue",
		`{}`:                                         "InvalidParameterValue",
		`[]`:                                         "InvalidParameterValue",
		`["eq","bucket","alice-in"]`:                 "InvalidParameterValue",
	} {
		policy := base64.StdEncoding.EncodeToString([]byte(`{"expiration":"2030-01-01T00:00:00Z","conditions":[` + conditions + `]}`))
		r := w.as(alice, "BundleInstance", "InstanceId", "i-a1", "Storage.S3.Bucket", "alice-in", "Storage.S3.Prefix", "p", "Storage.S3.AWSAccessKeyId", "KEYALICE",
			"Storage.S3.UploadPolicy", policy, "Storage.S3.UploadPolicySignature", "x", "DryRun", "true")
		if r.Code != want {
			t.Errorf("%s: %s, want %s: %s", conditions, r.Code, want, r.first("Message"))
		}
	}
}

// TestRestoreOfAnothersImage: an Instar image is registered again where it was; an
// account that may not register what lies there does not get at it by an object
// of it in a bucket of its own.
func TestRestoreOfAnothersImage(t *testing.T) {
	w, location, buckets := newBucketWorld(t)
	id := w.want("", alice, "RegisterImage", "Name", "web", "ImageLocation", location).first("imageId")
	key := w.want("", alice, "CreateStoreImageTask", "ImageId", id, "Bucket", "alice-out").first("objectKey")
	w.work(t, func() bool {
		return w.want("", alice, "DescribeStoreImageTasks", "ImageId.1", id).first("storeTaskState") == "Completed"
	})
	// The same as if the image were an Instar image, in bob's bucket.
	s, err := upload.OpenDir(filepath.Join(buckets, "alice-out"), false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	o, err := stored.Open(t.Context(), s, key)
	if err != nil {
		t.Fatal(err)
	}
	doc, _, err := chunked.Split(o.Head)
	if err != nil {
		t.Fatal(err)
	}
	var is struct{ Image struct{ Digest string } }
	if err := json.Unmarshal(doc, &is); err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(doc), `"kind":"bundle"`, `"kind":"instar"`, 1)
	text = strings.Replace(text, `"location":"`+location+`"`, `"location":"web@`+is.Image.Digest+`"`, 1)
	head, err := chunked.Sign(t.Context(), []byte(text), catalog.Namespace, w.signer)
	if err != nil {
		t.Fatal(err)
	}
	members := []stored.Member{{Name: "m", SHA256: chunked.NameOf(nil).String()}}
	r, err := stored.NewReader(t.Context(), head, members, w.now, func(context.Context, stored.Member) (io.ReadCloser, error) {
		return io.NopCloser(strings.NewReader("")), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	object, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	// Its members are what they were: they lie where the head says, in zeros.
	object = append(object, make([]byte, o.Size)...)
	if err := os.WriteFile(filepath.Join(buckets, "bob-in", "web.bin"), object, 0o600); err != nil {
		t.Fatal(err)
	}
	restore := []string{"Bucket", "bob-in", "ObjectKey", "web.bin", "Name", "mine"}
	w.want("AuthFailure", bob, "CreateRestoreImageTask", restore...)
	w.want("UnauthorizedOperation", bob, "CreateRestoreImageTask", append([]string{"DryRun", "true"}, restore...)...)
	if r := w.want("", bob, "DescribeImages"); r.first("imageId") != "" {
		t.Errorf("bob has %s", r.Body)
	}
	for images, want := range map[string]string{"mail*": "AuthFailure", "web*": ""} {
		accounts := filepath.Join(t.TempDir(), "accounts.yaml")
		if err := os.WriteFile(accounts, []byte(strings.Replace(accountsYAML, "buckets: [bob-*]", "buckets: [bob-*]\n    images: ['"+images+"']", 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		a, err := ec2api.ReadAccounts(accounts)
		if err != nil {
			t.Fatal(err)
		}
		w.api, err = ec2api.New(ec2api.Options{Catalog: w.catalog, Accounts: func() *ec2api.Accounts { return a }, Region: region, Tasks: w.tasks, Now: func() time.Time { return w.now }})
		if err != nil {
			t.Fatal(err)
		}
		w.want(want, bob, "CreateRestoreImageTask", restore...)
	}
}
