package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
)

const (
	region = "eu-bench-1"
	bucket = "bench"
	owner  = "111122223333" // who asks, and whose every other image is
	others = "222233334444" // the rest is shared with everybody

	accessKey, secretKey = "AKBENCH", "a-secret-for-the-bench"
	minioUser, minioKey  = "benchbench", "benchbenchbench"

	accounts = `accounts: [{id: "` + owner + `", keys: [{access-key-id: ` + accessKey + `, secret-access-key: ` + secretKey + `}]}]`
)

// region of the bench: a catalog, and requests about it.
type filled struct {
	objects upload.Store
	catalog *catalog.Catalog
	ids     []string
	answers int // to byFilters
	search  string
}

// fill makes a catalog with so many images, in a few changes.
func fill(ctx context.Context, dir, minio string, n int) (*filled, error) {
	signer, err := keys.WriteSigningKey(filepath.Join(dir, "key"), "")
	if err != nil {
		return nil, err
	}
	line := `* namespaces="` + catalog.Namespace + `,instar-task" ` + keys.SSHKeyLine(signer.Public()) + "\n"
	if err := os.WriteFile(filepath.Join(dir, "signers"), []byte(line), 0o600); err != nil {
		return nil, err
	}
	trust, err := keys.ReadAllowedSigners(filepath.Join(dir, "signers"))
	if err != nil {
		return nil, err
	}
	objects, err := upload.Open(ctx, "s3://"+bucket+"/fleet", upload.Options{
		Endpoint: "http://" + minio, Region: "us-east-1", Credentials: &upload.Credentials{AccessKeyID: minioUser, SecretAccessKey: minioKey},
	})
	if err != nil {
		return nil, err
	}
	f := &filled{objects: objects}
	if err := f.register(ctx, trust, signer, n); err != nil {
		objects.Close()
		return nil, err
	}
	return f, nil
}

func (f *filled) register(ctx context.Context, trust *keys.AllowedSigners, signer keys.Signer, n int) error {
	b, ok := f.objects.(upload.BucketManager)
	if !ok {
		return fmt.Errorf("%s is no bucket", f.objects)
	}
	if err := b.CreateBucket(ctx, ""); err != nil {
		return err
	}
	var err error
	if f.catalog, err = catalog.Open(f.objects, catalog.Options{Trust: trust, Signer: signer}); err != nil {
		return err
	}
	if err := f.catalog.Create(ctx, region); err != nil {
		return err
	}
	const each = 20_000
	for from := 0; from < n; from += each {
		if err := f.catalog.Update(ctx, func(t *catalog.Tx) error {
			for i := from; i < min(n, from+each); i++ {
				if err := t.PutImage(ctx, image(i, t.Now())); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	for i := range n {
		f.ids = append(f.ids, idOf(i))
		if m := image(i, time.Now()); m.Architecture == "arm64" && m.Owner == owner && m.Tags["stage"] == "production" {
			f.answers++
		}
	}
	f.search = f.presign("Action=DescribeImages&Version=2016-11-15&Filter.1.Name=architecture&Filter.1.Value.1=arm64&Filter.2.Name=tag%3Astage&Filter.2.Value.1=prod%2A")
	return nil
}

func idOf(i int) string {
	sum := sha256.Sum256(fmt.Append(nil, i))
	return "ami-" + hex.EncodeToString(sum[:])[:17]
}

// image is a record as an image that a machine was captured into has it.
func image(i int, at time.Time) *catalog.Image {
	sum := sha256.Sum256(fmt.Append(nil, "content", i))
	digest := hex.EncodeToString(sum[:])
	m := &catalog.Image{
		ID: idOf(i), Revision: 1, Owner: owner, Name: fmt.Sprintf("web-%d 2026-11-%02d", i, i%28+1), State: catalog.Available, Kind: catalog.KindInstar,
		Description: fmt.Sprintf("nginx on Debian 12, build %d", i), Location: fmt.Sprintf("web-%d@%s", i/20, digest), Digest: digest,
		Signer: "ssh-ed25519 SHA256:0123456789abcdefghijklmnopqrstuvwxyzABCDEFG", Size: 8 << 30, Stored: 912 << 20, Added: 41 << 20,
		Architecture: "x86_64", Type: "machine", RootDeviceType: "instance-store", RootDeviceName: "/dev/sda1", VirtualizationType: "hvm", Hypervisor: "xen",
		PlatformDetails: "Linux/UNIX", UsageOperation: "RunInstances", ImdsSupport: "v2.0", EnaSupport: true, Created: at,
		BlockDevices: []catalog.BlockDevice{{Device: "/dev/sdb", Virtual: "ephemeral0"}},
		Tags:         catalog.Tags{"stage": "test", "team": fmt.Sprintf("team-%d", i%40), "build": fmt.Sprint(i)},
		History:      []catalog.Change{{Time: at, Revision: 1, Action: "RegisterImage", Account: owner, By: "AKBENCH", Detail: fmt.Sprintf("web-%d@%s", i/20, digest)}},
	}
	if i%2 == 1 {
		m.Owner, m.Public = others, true
	}
	if i%10 == 0 {
		m.Architecture = "arm64"
	}
	if i%100 == 0 {
		m.Tags["stage"] = "production"
	}
	return m
}

// presign makes a request that is good as long as the bench takes.
func (f *filled) presign(query string) string {
	u := url.URL{Scheme: "http", Host: "catalog", Path: "/", RawQuery: query + "&X-Amz-Expires=36000"}
	r := &http.Request{Method: http.MethodGet, URL: &u, Host: u.Host, Header: http.Header{}}
	none := sha256.Sum256(nil)
	signed, _, err := v4.NewSigner().PresignHTTP(context.Background(), aws.Credentials{AccessKeyID: accessKey, SecretAccessKey: secretKey}, r, hex.EncodeToString(none[:]), "ec2", region, time.Now())
	if err != nil {
		panic(err) // nothing of it comes from outside
	}
	at, _ := url.Parse(signed)
	return at.RequestURI()
}

// byID asks for one image, another for each i.
func (f *filled) byID(i int) string {
	return f.presign("Action=DescribeImages&Version=2016-11-15&ImageId.1=" + f.ids[i*7919%len(f.ids)])
}

// byFilters asks for those of a hundredth.
func (f *filled) byFilters() string { return f.search }

// change changes an image each second, as another writer, until it is stopped.
func (f *filled) change(ctx context.Context) (stop func() error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	var failed error
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
			if err := f.catalog.SetDescription(ctx, catalog.Call{Account: owner, By: "bench"}, f.ids[i*2*7919%len(f.ids)], fmt.Sprintf("changed %d", i)); err != nil && ctx.Err() == nil {
				failed = err
				return
			}
		}
	})
	return func() error { cancel(); wg.Wait(); return failed }
}
