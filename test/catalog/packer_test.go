package catalog

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
)

// TestPacker replays what Packer's amazon-instance builder does, in its order:
// its calls in their wire form, and its two commands with their exact words,
// by the names it calls them.
func TestPacker(t *testing.T) {
	w := newWorld(t)
	name := "packer-1763812800"

	// Who am I, is there such a region, is the name free, a key pair.
	if r := w.sts(t, "Action=GetCallerIdentity&Version=2011-06-15"); !strings.Contains(r, "<Account>"+alice+"</Account>") {
		t.Errorf("GetCallerIdentity: %s", r)
	}
	if r := w.api(t, "Action=DescribeRegions&Version=2016-11-15"); !strings.Contains(r, "<regionName>"+other+"</regionName>") {
		t.Errorf("DescribeRegions: %s", r)
	}
	byName := "Action=DescribeImages&Filter.1.Name=name&Filter.1.Value.1=" + name + "&Owner.1=self&Version=2016-11-15"
	if r := w.api(t, byName); strings.Contains(r, "<item>") {
		t.Errorf("the name is taken: %s", r)
	}
	r := w.api(t, "Action=CreateKeyPair&KeyName=packer_6741d0c0&KeyType=rsa&TagSpecification.1.ResourceType=key-pair&TagSpecification.1.Tag.1.Key=Name&TagSpecification.1.Tag.1.Value=Packer+Builder&Version=2016-11-15")
	if !strings.Contains(r, "PRIVATE KEY") {
		t.Errorf("CreateKeyPair: %s", r)
	}

	// The two commands, on a machine whose root is small: a directory stands for
	// it, with /tmp/*'s expansion as a shell gives it.
	root := loopfs.Make(t, "ext4", 64<<20)
	loopfs.Run(t, "bash", "-ec", `cd "$1"; mkdir -p etc tmp usr/bin; echo machine >etc/hostname; cp "$2" tmp/key.pem; cp "$3" tmp/cert.pem; touch tmp/script.sh`,
		"bash", root, w.Keys.UserKey, w.Keys.UserCert)
	links := w.path("bin")
	if err := os.MkdirAll(links, 0o755); err != nil {
		t.Fatal(err)
	}
	w.Want(t, instar.OK, "links", links)
	etc := filepath.Join(w.Home, "etc")
	if err := os.MkdirAll(etc, 0o755); err != nil {
		t.Fatal(err)
	}
	cert, err := os.ReadFile(w.Keys.CloudPK)
	if err != nil {
		t.Fatal(err)
	}
	for file, data := range map[string]string{"ec2-cert.pem": string(cert), "config.yaml": "endpoint: " + w.minio.Endpoint + "\nregion: " + w.minio.Region + "\n"} {
		if err := os.WriteFile(filepath.Join(etc, file), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env := []string{"PATH=" + links + ":/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "INSTAR_ETC=" + etc, "AWS_EC2_METADATA_SERVICE_ENDPOINT=http://127.0.0.1:1", "TMPDIR=" + t.TempDir()}
	tmp := filepath.Join(root, "tmp")
	w.run(t, env, "bash", "-ec", `cd /; ec2-bundle-vol -k "$1"/key.pem -u `+alice+` -c "$1"/cert.pem -r x86_64 -e "$1"/* -d "$1" -p image-1763812800 --batch --no-filter -v "$2"`, "bash", tmp, root)
	w.run(t, env, "bash", "-ec", `cd /; ec2-upload-bundle -b "$2" -m "$1"/image-1763812800.manifest.xml -a "$3" -s "$4" -d "$1" --batch --region `+w.minio.Region+` --retry`,
		"bash", tmp, w.bucket+"/bundles", w.minio.AccessKey, w.minio.SecretKey)

	// The SDK of version 1 writes its parameters sorted.
	location := w.bucket + "%2Fbundles%2Fimage-1763812800.manifest.xml"
	id := element(w.api(t, "Action=RegisterImage&BlockDeviceMapping.1.DeviceName=%2Fdev%2Fsdb&BlockDeviceMapping.1.VirtualName=ephemeral0&EnaSupport=true&ImageLocation="+
		location+"&Name="+name+"&SriovNetSupport=simple&Version=2016-11-15&VirtualizationType=hvm"), "imageId")
	if !strings.HasPrefix(id, "ami-") {
		t.Fatalf("RegisterImage gives %q", id)
	}
	r = w.api(t, "Action=DescribeImages&ImageId.1="+id+"&Version=2016-11-15")
	for name, want := range map[string]string{"imageState": "available", "rootDeviceType": "instance-store", "architecture": "x86_64", "virtualizationType": "hvm", "virtualName": "ephemeral0", "imageOwnerId": alice} {
		if got := element(r, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	// To the other region's endpoint, with the token the SDK adds.
	copied := element(w.apiAt(t, w.url2, other, "ec2", "Action=CopyImage&ClientToken=0dbd6b3c-6d53-4a5b-8b3c-3f2f6b9f6f5e&Description=&Name="+name+"&SourceImageId="+id+"&SourceRegion="+region+"&Version=2016-11-15"), "imageId")
	w.run(t, w.clean(), "/usr/bin/aws", "--endpoint-url", w.url2, "--region", other, "ec2", "wait", "image-available", "--image-ids", copied)
	for _, form := range []string{
		"Action=EnableImageDeprecation&DeprecateAt=2027-01-15T08%3A00%3A00Z&ImageId=" + id + "&Version=2016-11-15",
		"Action=EnableImageDeregistrationProtection&ImageId=" + id + "&Version=2016-11-15&WithCooldown=false",
		"Action=ModifyImageAttribute&Description.Value=by+Packer&ImageId=" + id + "&Version=2016-11-15",
		"Action=ModifyImageAttribute&ImageId=" + id + "&LaunchPermission.Add.1.Group=all&UserGroup.1=all&Version=2016-11-15",
		"Action=ModifyImageAttribute&ImageId=" + id + "&LaunchPermission.Add.1.UserId=" + bob + "&UserId.1=" + bob + "&Version=2016-11-15",
		"Action=ModifyImageAttribute&ImageId=" + id + "&ProductCode.1=774F4FF8&Version=2016-11-15",
		"Action=ModifyImageAttribute&ImageId=" + id + "&ImdsSupport.Value=v2.0&Version=2016-11-15",
		"Action=DescribeImages&ImageId.1=" + id + "&Version=2016-11-15",
		"Action=CreateTags&ResourceId.1=" + id + "&Tag.1.Key=built&Tag.1.Value=by+packer&Version=2016-11-15",
		"Action=DeleteKeyPair&KeyName=packer_6741d0c0&Version=2016-11-15",
	} {
		w.api(t, form)
	}
	r = w.api(t, byName)
	for name, want := range map[string]string{
		"imageId": id, "description": "by Packer", "isPublic": "true", "productCode": "774F4FF8", "imdsSupport": "v2.0",
		"deprecationTime": "2027-01-15T08:00:00.000Z", "deregistrationProtection": "enabled-without-cooldown", "value": "by packer",
	} {
		if got := element(r, name); got != want {
			t.Errorf("at the end %s is %q, want %q", name, got, want)
		}
	}
	// The copy is the same image, and opens.
	w.Want(t, instar.OK, "download-and-unbundle", "-b", strings.TrimSuffix(strings.TrimSuffix(element(w.apiAt(t, w.url2, other, "ec2", "Action=DescribeImages&ImageId.1="+copied), "imageLocation"), "/image-1763812800.manifest.xml"), "/"),
		"-m", "image-1763812800.manifest.xml", "-k", w.Keys.UserKey, "-c", w.Keys.UserCert, "-d", w.path("copy.img"), "--batch")
	loopfs.Run(t, "e2fsck", "-fn", w.path("copy.img"))
}

// element is the text of the first element of a name.
func element(doc, name string) string {
	_, rest, _ := strings.Cut(doc, "<"+name+">")
	text, _, _ := strings.Cut(rest, "</"+name+">")
	return text
}
