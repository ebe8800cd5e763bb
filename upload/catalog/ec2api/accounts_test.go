package ec2api

import (
	"archive/zip"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func writeFile(t *testing.T, name string, mode os.FileMode, text string) string {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, mode); err != nil { // whatever the umask
		t.Fatal(err)
	}
	return name
}

// export is what "mc admin cluster iam export" makes, as far as it is read.
func export(t *testing.T, name, users, mappings string) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	z := zip.NewWriter(f)
	policies := `{"readwrite":{},"instar-account-111111111111":{},"instar-account-111111111111-read-only":{},"instar-account-222222222222":{}}`
	for file, text := range map[string]string{"users": users, "user_mappings": mappings, "policies": policies, "groups": "{}", "svcaccts": "{}", "group_mappings": "{}", "stsuser_mappings": "{}"} {
		w, err := z.Create("iam-assets/" + file + ".json")
		if err == nil {
			_, err = w.Write([]byte(text))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAccounts(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "secret"), 0o600, "secret-of-a-file\n")
	export(t, filepath.Join(dir, "export.zip"),
		`{"carol":{"secretKey":"secret-of-carol","status":"enabled"},"dave":{"secretKey":"secret-of-dave","status":"disabled"},"eve":{"secretKey":"secret-of-eve","status":"enabled"},"frank":{"secretKey":"secret-of-frank","status":"enabled"}}`,
		`{"carol":{"version":1,"policy":"readwrite,instar-account-222222222222"},"dave":{"version":1,"policy":"instar-account-222222222222"},"eve":{"version":1,"policy":"readwrite"},"frank":{"version":1,"policy":"instar-account-111111111111-read-only"}}`)
	a, err := ReadAccounts(writeFile(t, filepath.Join(dir, "accounts.yaml"), 0o640, `
accounts:
  - id: "111111111111"
    buckets: [a-*]
    keys:
      - {access-key-id: KEY1, secret-access-key: secret-of-key1, session-token: t, expires: 2027-01-01T00:00:00Z}
      - {access-key-id: KEY2, secret-file: secret, read-only: true}
minio: {export: export.zip}
`))
	if err != nil {
		t.Fatal(err)
	}
	if a.Len() != 4 {
		t.Errorf("%d keys: %v", a.Len(), sortedKeys(a.keys))
	}
	k1, k2 := a.keys["KEY1"], a.keys["KEY2"]
	if k1.key.Token != "t" || !k1.key.Expires.Equal(time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)) || k1.account != k2.account || !k1.account.uses("a-x") || k1.account.uses("b") || k1.account.owns("i-1") {
		t.Errorf("KEY1 is %+v", k1)
	}
	if k2.key.Secret != "secret-of-a-file" || !k2.readOnly {
		t.Errorf("KEY2 is %+v", k2)
	}
	if c := a.keys["carol"]; c.account == nil || c.account.id != "222222222222" || c.readOnly || c.key.Secret != "secret-of-carol" {
		t.Errorf("carol is %+v", c)
	}
	if f := a.keys["frank"]; f.account != k1.account || !f.readOnly {
		t.Errorf("frank is %+v", f)
	}
	if s := fmt.Sprintf("%v %+v %#v", k1.key, k1.key, k1.key); strings.Contains(s, "secret-of") {
		t.Errorf("a secret is printed: %s", s)
	}
}

func TestAccountsThatAreWrong(t *testing.T) {
	dir := t.TempDir()
	export(t, filepath.Join(dir, "two.zip"), `{"x":{"secretKey":"secret-of-x","status":"enabled"}}`, `{"x":{"policy":"instar-account-111111111111,instar-account-222222222222"}}`)
	writeFile(t, filepath.Join(dir, "no.zip"), 0o600, "no zip")
	key := "keys: [{access-key-id: KEY, secret-access-key: secret-of-key}]"
	for text, want := range map[string]string{
		"":                                   "no access key",
		"accounts: [{id: '1', " + key + "}]": "12 digits",
		"accounts: [{id: '111111111111'}]":   "no access key",
		"accounts: [{id: '111111111111', colour: red}]":                                                                    "colour",
		"accounts: [{id: '111111111111', " + key + "}, {id: '111111111111'}]":                                              "twice",
		"accounts: [{id: '111111111111', " + key + "}, {id: '222222222222', " + key + "}]":                                 "twice",
		"accounts: [{id: '111111111111', buckets: ['['], " + key + "}]":                                                    "pattern",
		"accounts: [{id: '111111111111', keys: [{access-key-id: KEY, secret-access-key: short}]}]":                         "8 to 1024",
		"accounts: [{id: '111111111111', keys: [{access-key-id: K Y, secret-access-key: secret-of-key}]}]":                 "access-key-id",
		"accounts: [{id: '111111111111', keys: [{access-key-id: KEY, secret-access-key: secret-of-key, secret-file: x}]}]": "secret-file",
		"accounts: [{id: '111111111111', keys: [{access-key-id: KEY, secret-file: nowhere}]}]":                             "nowhere",
		"minio: {export: two.zip}":                   "no access key",
		"minio: {export: no.zip}":                    "not an export",
		"minio: {policy: x}":                         "needs a url",
		"minio: {export: two.zip, url: 'https://x'}": "nothing else",
		"minio: {url: 'http://x.example', access-key-id: k, secret-access-key: secret-of-x}":                          "not https",
		"minio: {url: 'https://x.example'}":                                                                           "access key",
		"minio: {url: 'https://x.example', access-key-id: k, secret-access-key: secret-of-x, secret-file: secret}":    "secret-file",
		"minio: {url: 'https://x.example', access-key-id: k, secret-file: nowhere}":                                   "nowhere",
		"minio: {url: 'https://x.example', access-key-id: k, secret-access-key: secret-of-x, ca-cert: accounts.yaml}": "PEM",
		"minio: {url: 'https://x.example', access-key-id: k, secret-access-key: secret-of-x, every: 10m, keep: 5m}":   "every is",
		"minio: {url: 'https://x.example', access-key-id: k, secret-access-key: secret-of-x, every: 1ms}":             "every is",
		"minio: {url: 'https://x.example', access-key-id: k, secret-access-key: secret-of-x, keep: 1000h}":            "every is",
	} {
		_, err := ReadAccounts(writeFile(t, filepath.Join(dir, "accounts.yaml"), 0o600, text))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "secret-of-") {
			t.Errorf("%q: the error shows a secret: %v", text, err)
		}
	}
	if _, err := ReadAccounts(writeFile(t, filepath.Join(dir, "open.yaml"), 0o604, "accounts: [{id: '111111111111', "+key+"}]")); err == nil || !strings.Contains(err.Error(), "chmod o=") {
		t.Errorf("readable by everybody: %v", err)
	}
}

// FuzzRequest decodes anything into every action's parameters.
func FuzzRequest(f *testing.F) {
	f.Add("Action=DescribeImages&ImageId.1=ami-0123456789abcdef0&Filter.1.Name=name&Filter.1.Value.2=x&DryRun=true", "")
	f.Add("", "Action=RegisterImage&BlockDeviceMapping.3.Ebs.VolumeSize=8&BlockDeviceMapping.3.NoDevice=&TagSpecification.1.Tag.1.Key=k")
	f.Add("a=1&a=2", "Storage.S3.UploadPolicy=%%&DeprecateAt=2027-01-15T08:00:00Z&MaxResults=99999999999999999999")
	kinds := []func() any{
		func() any { return new(describeImages) }, func() any { return new(registerImage) }, func() any { return new(modifyImageAttribute) },
		func() any { return new(bundleInstance) }, func() any { return new(copyImage) }, func() any { return new(createImage) },
		func() any { return new(createTags) }, func() any { return new(importKeyPair) }, func() any { return new(enableImageDeprecation) },
	}
	f.Fuzz(func(t *testing.T, query, body string) {
		p, err := parseParams(query, "application/x-www-form-urlencoded; charset=utf-8", []byte(body))
		if err != nil {
			return
		}
		for _, k := range kinds {
			p.taken = map[string]bool{}
			if err := p.decode(k()); err == nil {
				for name := range p.values {
					if !p.taken[name] && name != "Action" && name != "Version" && !strings.HasPrefix(name, "X-Amz-") && !strings.HasPrefix(name, "Signature") &&
						name != "AWSAccessKeyId" && name != "Timestamp" && name != "Expires" {
						t.Fatalf("%q was neither taken nor refused", name)
					}
				}
			}
		}
	})
}
