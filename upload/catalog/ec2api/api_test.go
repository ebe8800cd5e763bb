package ec2api_test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/instar-image/instar/upload/catalog/tasks"
)

func TestImages(t *testing.T) {
	w := newWorld(t)
	id := w.register(alice, "first image", "Description", "d & <e>", "TagSpecification.1.ResourceType", "image", "TagSpecification.1.Tag.1.Key", "k",
		"TagSpecification.1.Tag.1.Value", "v", "BlockDeviceMapping.1.DeviceName", "/dev/sdb", "BlockDeviceMapping.1.VirtualName", "ephemeral0",
		"BlockDeviceMapping.4.DeviceName", "/dev/sdc", "BlockDeviceMapping.4.NoDevice", "")
	r := w.want("", alice, "DescribeImages", "ImageId.1", id)
	for name, want := range map[string]string{
		"imageId": id, "name": "first image", "description": "d & <e>", "imageState": "available", "imageOwnerId": alice, "key": "k", "value": "v",
		"virtualName": "ephemeral0", "architecture": "x86_64", "creationDate": "2026-11-22T12:00:00.000Z",
	} {
		if got := r.first(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if !strings.Contains(r.Body, "<noDevice></noDevice>") || !strings.Contains(r.Body, `xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"`) || r.first("requestId") == "" {
		t.Errorf("the answer is\n%s", r.Body)
	}
	w.want("InvalidAMIName.Duplicate", alice, "RegisterImage", "Name", "first image", "RootDeviceName", "/dev/sda1")
	w.want("InvalidAMIID.NotFound", bob, "DescribeImages", "ImageId.1", id)
	w.want("", alice, "ModifyImageAttribute", "ImageId", id, "LaunchPermission.Add.1.UserId", bob, "UserId.1", carol)
	if r := w.want("", bob, "DescribeImages", "ImageId.1", id); r.first("imageId") != id || r.first("key") != "" {
		t.Errorf("bob sees\n%s", r.Body)
	}
	for _, f := range [][2]string{{"tag:k", "v"}, {"tag-key", "k"}, {"tag-value", "*"}} {
		for who, want := range map[string]string{alice: id, bob: ""} {
			if r := w.want("", who, "DescribeImages", "Filter.1.Name", f[0], "Filter.1.Value.1", f[1]); r.first("imageId") != want {
				t.Errorf("by %q %s finds %q, want %q", f, who, r.first("imageId"), want)
			}
		}
	}
	w.want("AuthFailure", bob, "DescribeImageAttribute", "ImageId", id, "Attribute", "description")
	w.want("InvalidAMIID.NotFound", carol, "DescribeImageAttribute", "ImageId", id, "Attribute", "description")
	if r := w.want("", alice, "DescribeImageAttribute", "ImageId", id, "Attribute", "launchPermission"); r.first("userId") != bob || len(r.all("userId")) != 1 {
		t.Errorf("launch permissions are\n%s", r.Body)
	}
	w.want("", alice, "ModifyImageAttribute", "ImageId", id, "Attribute", "launchPermission", "OperationType", "add", "UserGroup.1", "all")
	w.want("", alice, "ResetImageAttribute", "ImageId", id, "Attribute", "launchPermission")
	w.want("InvalidAMIID.NotFound", bob, "DescribeImages", "ImageId.1", id)
	w.want("DryRunOperation", alice, "DeregisterImage", "ImageId", id, "DryRun", "true")
	w.want("UnauthorizedOperation", "KEYREADER", "DeregisterImage", "ImageId", id)
	w.want("DryRunOperation", "KEYREADER", "DescribeImages", "DryRun", "true")
	w.want("", alice, "DeregisterImage", "ImageId", id)
	w.want("InvalidAMIID.Unavailable", alice, "DescribeImages", "ImageId.1", id)
	w.want("InvalidAMIID.NotFound", bob, "DescribeImages", "ImageId.1", id)
}

func TestRequestsThatAreWrong(t *testing.T) {
	w := newWorld(t)
	id := w.register(alice, "an image")
	for _, c := range []struct {
		code   string
		action string
		pairs  []string
	}{
		{"InvalidAction", "RebootTheMoon", nil},
		{"InvalidAction", "RunInstances", nil},
		{"UnknownParameter", "DescribeImages", []string{"Colour", "red"}},
		{"UnknownParameter", "DescribeImages", []string{"ImageId.0", id}},
		{"UnknownParameter", "DescribeImages", []string{"ImageId.x", id}},
		{"InvalidParameterValue", "DescribeImages", []string{"DryRun", "perhaps"}},
		{"InvalidParameterValue", "DescribeImages", []string{"MaxResults", "0"}},
		{"InvalidParameterValue", "DescribeImages", []string{"MaxResults", "many"}},
		{"InvalidParameterValue", "DescribeImages", []string{"Filter.1.Name", "colour", "Filter.1.Value.1", "red"}},
		{"InvalidPaginationToken", "DescribeImages", []string{"NextToken", "AAAA"}},
		{"MissingParameter", "DeregisterImage", nil},
		{"MissingParameter", "ModifyImageAttribute", []string{"ImageId", id}},
		{"InvalidParameterCombination", "ModifyImageAttribute", []string{"ImageId", id, "Description.Value", "x", "LaunchPermission.Add.1.Group", "all"}},
		{"InvalidParameterValue", "ModifyImageAttribute", []string{"ImageId", id, "Attribute", "kernel", "Value", "x"}},
		{"InvalidAMIAttributeItemValue", "ModifyImageAttribute", []string{"ImageId", id, "LaunchPermission.Add.1.Group", "friends"}},
		{"InvalidAMIAttributeItemValue", "ModifyImageAttribute", []string{"ImageId", id, "LaunchPermission.Add.1.Group", "all", "LaunchPermission.Add.1.UserId", bob}},
		{"InvalidAMIID.Malformed", "DescribeImages", []string{"ImageId.1", "ami-x"}},
		{"InvalidAMIName.Malformed", "RegisterImage", []string{"Name", "a\tb", "RootDeviceName", "/dev/sda1"}},
		{"InvalidBlockDeviceMapping", "RegisterImage", []string{"Name", "abc", "RootDeviceName", "/dev/sda1", "BlockDeviceMapping.1.DeviceName", "/dev/sdb"}},
		{"InvalidParameterValue", "ImportKeyPair", []string{"KeyName", "k", "PublicKeyMaterial", "%%%"}},
		{"InvalidParameterValue", "EnableImageDeprecation", []string{"ImageId", id, "DeprecateAt", "soon"}},
		{"NoSuchVersion", "DescribeImages", []string{"Version", "latest"}},
		{"AuthFailure", "RegisterImage", []string{"Name", "abc", "ImageLocation", "bob-1/x.manifest.xml"}},
		{"AuthFailure", "RegisterImage", []string{"Name", "abc", "ImageLocation", "web-1@parent"}},
		{"InvalidBundleId.NotFound", "DescribeBundleTasks", []string{"BundleId.1", "bun-00000000000000000"}},
		{"InvalidInstanceID.NotFound", "CreateImage", []string{"InstanceId", "i-b1", "Name", "abc"}},
		{"InvalidInstanceID.Malformed", "CreateImage", []string{"InstanceId", "../x", "Name", "abc"}},
	} {
		w.want(c.code, alice, c.action, c.pairs...)
	}
	for name, want := range map[string]string{
		"Action=DescribeImages&Action=DeregisterImage&Version=2016-11-15": "MalformedQueryString",
		"Version=2016-11-15":                       "MissingParameter",
		"Action=DescribeImages&Name=%zz":           "MalformedQueryString",
		"Action=DescribeImages&Owner.1=%ff":        "MalformedQueryString",
		"Action=DescribeImages&" + many(6000):      "MalformedQueryString",
		"Action=GetCallerIdentity":                 "InvalidAction", // of another service
		"Action=DescribeImages&Version=2010-08-31": "",
		"Action=DescribeImages&&":                  "",
	} {
		if r := w.do(w.sign("KEYALICE", "ec2", name)); r.Code != want {
			t.Errorf("%.60s: %s, want %q\n%.300s", name, r.Code, want, r.Body)
		}
	}
	if r := w.do(w.sign("KEYNOBODY", "ec2", "Action=DescribeImages")); r.Code != "AuthFailure" || r.Status != 401 || r.first("RequestID") == "" {
		t.Errorf("an unknown key: %+v", r)
	}
	unsigned := httptest.NewRequest("POST", "/", strings.NewReader("Action=DescribeImages"))
	if r := w.do(unsigned); r.Code != "MissingAuthenticationToken" || r.Status != 403 {
		t.Errorf("unsigned: %+v", r)
	}
	big := httptest.NewRequest("POST", "/", strings.NewReader(strings.Repeat("a", 256<<10+1)))
	if r := w.do(big); r.Code != "RequestEntityTooLarge" {
		t.Errorf("a large body: %.300v", r)
	}
	if r := w.want("", alice, "GetCallerIdentity"); r.first("Account") != alice || r.first("RequestId") == "" {
		t.Errorf("who I am: %s", r.Body)
	}
}

// TestPresigned: a presigned request reads as long as it says, and changes
// something only as long as others do.
func TestPresigned(t *testing.T) {
	w := newWorld(t)
	id := w.register(alice, "an image")
	signed := w.now
	ask := func(action string) reply {
		t.Helper()
		r := httptest.NewRequestWithContext(t.Context(), "GET", "http://127.0.0.1:8773/?X-Amz-Expires=3600&Version=2016-11-15&Action="+action, nil)
		sum := sha256.Sum256(nil)
		url, _, err := v4.NewSigner().PresignHTTP(t.Context(), aws.Credentials{AccessKeyID: "KEYALICE", SecretAccessKey: secret}, r, hex.EncodeToString(sum[:]), "ec2", region, signed)
		if err != nil {
			t.Fatal(err)
		}
		return w.do(httptest.NewRequestWithContext(t.Context(), "GET", url, nil))
	}
	for _, c := range []struct {
		pass          time.Duration
		reads, change string
	}{{0, "", "DryRunOperation"}, {5 * time.Minute, "", "DryRunOperation"}, {time.Second, "", "RequestExpired"}, {time.Hour, "RequestExpired", "RequestExpired"}} {
		w.now = w.now.Add(c.pass)
		if r := ask("DescribeImages"); r.Code != c.reads {
			t.Errorf("read after %s: %q, want %q\n%s", w.now.Sub(signed), r.Code, c.reads, r.Body)
		}
		if r := ask("DeregisterImage&DryRun=true&ImageId=" + id); r.Code != c.change {
			t.Errorf("change after %s: %q, want %q\n%s", w.now.Sub(signed), r.Code, c.change, r.Body)
		}
	}
}

func many(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "&Owner.%d=self", i+1)
	}
	return b.String()
}

func TestPages(t *testing.T) {
	w := newWorld(t)
	var ids []string
	for i := range 7 {
		ids = append(ids, w.register(alice, fmt.Sprintf("image %d", i)))
	}
	seen := map[string]bool{}
	token, pages := "", 0
	for {
		pairs := []string{"Owner.1", "self", "MaxResults", "3"}
		if token != "" {
			pairs = append(pairs, "NextToken", token)
			// It is good for this caller, action and question alone.
			w.want("InvalidPaginationToken", bob, "DescribeImages", pairs...)
			w.want("InvalidPaginationToken", alice, "DescribeImages", "NextToken", token)
			w.want("InvalidPaginationToken", alice, "DescribeTags", "NextToken", token)
			for i := range token {
				bad := []byte(token)
				if bad[i]++; bad[i] == '{' || bad[i] == '[' || bad[i] == ':' {
					bad[i] = 'A'
				}
				w.want("InvalidPaginationToken", alice, "DescribeImages", "Owner.1", "self", "MaxResults", "3", "NextToken", string(bad))
			}
		}
		r := w.want("", alice, "DescribeImages", pairs...)
		for _, id := range r.all("imageId") {
			if seen[id] {
				t.Errorf("%s is on two pages", id)
			}
			seen[id] = true
		}
		pages++
		if token = r.first("nextToken"); token == "" {
			break
		}
	}
	if len(seen) != len(ids) || pages != 3 {
		t.Errorf("%d images on %d pages, want %d on 3", len(seen), pages, len(ids))
	}
}

func TestCreateImage(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	id := w.want("", alice, "CreateImage", "InstanceId", "i-a1", "Name", "of a machine", "NoReboot", "true").first("imageId")
	state := func() (string, string) {
		t.Helper()
		r := w.want("", alice, "DescribeImages", "ImageId.1", id)
		return r.first("imageState"), r.first("code")
	}
	if s, _ := state(); s != "pending" {
		t.Errorf("at first it is %s", s)
	}
	w.want("InvalidAMIName.Duplicate", alice, "CreateImage", "InstanceId", "i-a2", "Name", "of a machine")
	w.want("InvalidAMIID.NotFound", bob, "DescribeImages", "ImageId.1", id)
	waiting, _, err := w.tasks.Waiting(ctx, "i-a1")
	if err != nil || len(waiting) != 1 || waiting[0].ImageID != id || waiting[0].Name != "i-a1" || !waiting[0].NoReboot {
		t.Fatalf("waiting: %+v, %v", waiting, err)
	}
	mine, err := w.tasks.Take(ctx, waiting[0], "agent")
	if err != nil {
		t.Fatal(err)
	}
	// What the agent names must be what it was asked for.
	if _, err := w.tasks.Update(ctx, mine, tasks.Status{State: tasks.Complete, Manifest: "i-b1@" + strings.Repeat("0", 64)}); err != nil {
		t.Fatal(err)
	}
	if s, why := state(); s != "failed" || why != "Server.InternalError" {
		t.Errorf("an image of another instance: %s, %s", s, why)
	}
	id = w.want("", alice, "CreateImage", "InstanceId", "i-a1", "Name", "of a machine that is off").first("imageId")
	w.now = w.now.Add(tasks.Lifetime)
	if err := w.api.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	if s, why := state(); s != "failed" || why != "Client.InstanceUnreachable" {
		t.Errorf("nobody took it: %s, %s", s, why)
	}
}

func TestKeyPairsAndPlaces(t *testing.T) {
	w := newWorld(t)
	r := w.want("", alice, "CreateKeyPair", "KeyName", "k1", "KeyType", "ed25519", "TagSpecification.1.ResourceType", "key-pair", "TagSpecification.1.Tag.1.Key", "a")
	id := r.first("keyPairId")
	if !strings.Contains(r.first("keyMaterial"), "PRIVATE KEY") || id == "" {
		t.Errorf("created:\n%s", r.Body)
	}
	w.want("InvalidKeyPair.Duplicate", alice, "CreateKeyPair", "KeyName", "k1")
	w.want("InvalidKeyPair.NotFound", bob, "DescribeKeyPairs", "KeyName.1", "k1")
	w.want("InvalidKey.Format", alice, "ImportKeyPair", "KeyName", "k2", "PublicKeyMaterial", "bm8ga2V5")
	w.want("", alice, "CreateTags", "ResourceId.1", id, "Tag.1.Key", "b", "Tag.1.Value", "c")
	if r := w.want("", alice, "DescribeTags", "Filter.1.Name", "resource-type", "Filter.1.Value.1", "key-*"); len(r.all("key")) != 2 {
		t.Errorf("tags:\n%s", r.Body)
	}
	if r := w.want("", bob, "DescribeTags"); len(r.all("key")) != 0 {
		t.Errorf("bob sees tags:\n%s", r.Body)
	}
	if r := w.want("", alice, "DescribeKeyPairs", "Filter.1.Name", "tag:b", "Filter.1.Value.1", "?", "IncludePublicKey", "true"); !strings.HasPrefix(r.first("publicKey"), "ssh-ed25519 ") {
		t.Errorf("key pairs:\n%s", r.Body)
	}
	w.want("", alice, "DeleteKeyPair", "KeyName", "k1")
	w.want("", alice, "DeleteKeyPair", "KeyName", "k1")
	if r := w.want("", alice, "DescribeRegions"); r.first("regionName") != region || r.first("regionEndpoint") != "127.0.0.1:8773" {
		t.Errorf("regions:\n%s", r.Body)
	}
	w.want("InvalidParameterValue", alice, "DescribeRegions", "RegionName.1", "moon-1")
	if r := w.want("", alice, "DescribeAvailabilityZones"); r.first("zoneName") != region+"a" {
		t.Errorf("zones:\n%s", r.Body)
	}
}
