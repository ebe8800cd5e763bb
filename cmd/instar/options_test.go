package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/instar-image/instar/cmd/instar/internal/optdoc"
)

// peerOptions are the peers' options as their manuals and sources have them,
// written down apart from the flags: what is forgotten there is missed here.
// A word in angle brackets stands for a group.
var peerOptions = map[string]string{
	"<ec2>":      "-h --help --version --manual --batch --debug",
	"<euca>":     "-h --help --version --debug --debugger",
	"<s3>":       "-b --bucket -a --access-key -s --secret-key -t --delegation-token --url --region --sigv --retry",
	"<service>":  "-U --url -I --access-key-id -S --secret-key --security-token --region",
	"<bundling>": "-c --cert -k --privatekey -u --user -d --destination --ec2cert -r --arch --productcodes --no-size-checks --kernel --ramdisk -B --block-device-mapping -p --prefix",
	"<image>": "-i --image -p --prefix -d --destination -r --arch -k --privatekey -c --cert --ec2cert -u --user --kernel --ramdisk -B --block-device-mappings " +
		"--productcodes --image-size --bootstrap-url --image-type --part-size --enc-key --enc-iv --batch",
	"<upload>":         "-b --bucket --acl --upload-policy --upload-policy-file --upload-policy-signature --location --retry",
	"ec2-bundle-image": "<ec2> <bundling> -i --image",
	"ec2-bundle-vol": "<ec2> <bundling> -a --all -e --exclude -i --include --no-filter -s --size --inherit --no-inherit -v --volume --fstab --generate-fstab " +
		"--grub-config -P --partition -S --script --clone-only",
	"ec2-unbundle":          "<ec2> -k --privatekey -m --manifest -s --source -d --destination",
	"ec2-upload-bundle":     "<ec2> <s3> -m --manifest --acl -d --directory --part --skipmanifest --location",
	"ec2-download-bundle":   "<ec2> <s3> -k --privatekey -m --manifest -p --prefix -d --directory",
	"ec2-delete-bundle":     "<ec2> <s3> -m --manifest -p --prefix -y --yes --clear",
	"ec2-migrate-manifest":  "<ec2> -c --cert -k --privatekey -m --manifest -a --access-key -s --secret-key --region --kernel --ramdisk --no-mapping --ec2cert",
	"ec2-migrate-bundle":    "<ec2> -c --cert -k --privatekey -m --manifest -b --bucket -d --destination-bucket -a --access-key -s --secret-key --ec2cert --acl --url --retry --location --kernel --ramdisk --no-mapping --region",
	"ec2-ami-tools-version": "",
	"euca-bundle-image":     "<euca> <image> --region",
	"euca-bundle-vol": "<euca> -p --prefix -d --destination -r --arch -e --exclude -i --include -s --size --no-filter --all --inherit --no-inherit -v --volume -P --partition --script " +
		"--fstab --generate-fstab --grub-config -k --privatekey -c --cert --ec2cert -u --user --kernel --ramdisk -B --block-device-mappings --productcodes --bootstrap-url --part-size --enc-key --enc-iv --region",
	"euca-bundle-and-upload-image": "<euca> <image> <upload> <service> --preserve-bundle --max-pending-parts",
	"euca-install-image":           "<euca> <image> <upload> <service> --preserve-bundle --max-pending-parts -n --name --description --virtualization-type --platform --ec2-url",
	"euca-upload-bundle":           "<euca> <upload> <service> -m --manifest -d --directory --skipmanifest --part",
	"euca-download-bundle":         "<euca> <service> -b --bucket -m --manifest -p --prefix --local-manifest -d --directory",
	"euca-download-and-unbundle":   "<euca> <service> -b --bucket -m --manifest -p --prefix --local-manifest -k --privatekey -d",
	"euca-unbundle":                "<euca> -m --manifest -s --source -d --destination -k --privatekey --region",
	"euca-unbundle-stream":         "<euca> -i -o --enc-key --enc-iv --image-size --sha1-digest --region",
	"euca-delete-bundle":           "<euca> <service> -b --bucket -m --manifest -p --prefix --local-manifest --clear",
	"euca-bundle-instance":         "<service> -b -p --prefix -o --owner-akid --user-access-key -c --policy -s --policy-signature -w --owner-sak --user-secret-key -x --expires",
	"euca-describe-bundle-tasks":   "<service> --filter",
	"euca-cancel-bundle-task":      "<service>",
	"euimage-pack-image":           "",
	"euimage-describe-pack":        "",
	"euimage-install-pack":         "--profile --privatekey --cert --ec2cert --user -b --location --kernel --ramdisk --ec2-url",
	"euca-version":                 "",
}

// options splits an entry of peerOptions, groups resolved.
func options(s string) []string {
	var out []string
	for f := range strings.FieldsSeq(s) {
		if strings.HasPrefix(f, "<") {
			out = append(out, options(peerOptions[f])...)
			continue
		}
		out = append(out, f)
	}
	return out
}

func testRoot() *cobra.Command {
	return newRoot(newApp([]string{"instar"}, nil, os.Stdout, os.Stderr, func(string) string { return "" }))
}

func TestEveryPeerOptionIsListed(t *testing.T) {
	listed := map[string][]string{}
	for _, r := range optionRows(testRoot()) {
		for o := range strings.SplitSeq(r.Option, ", ") {
			listed[r.Tool] = append(listed[r.Tool], o)
		}
	}
	for tool, opts := range peerOptions {
		if strings.HasPrefix(tool, "<") {
			continue
		}
		if !slices.Contains(peerNames(), tool) {
			t.Errorf("%s has no link", tool)
		}
		for _, o := range options(opts) {
			if !slices.Contains(listed[tool], o) {
				t.Errorf("docs/options.md has no %s %s", tool, o)
			}
		}
	}
}

func TestOptionsTableIsCurrent(t *testing.T) {
	var want bytes.Buffer
	if err := optdoc.Write(&want, optionRows(testRoot())); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("../../docs/options.md")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Error("docs/options.md is not current: go run ./cmd/instar options-table > docs/options.md")
	}
}

// TestNamedTestsUseTheOption checks that the test named for an option exists
// and gives the option to a program.
func TestNamedTestsUseTheOption(t *testing.T) {
	scripts := map[string]string{}
	for _, r := range optionRows(testRoot()) {
		if r.Option == "" || r.Refused != "" {
			continue
		}
		if len(r.Tests) == 0 {
			t.Errorf("%s %s: no test is named", r.Tool, r.Option)
		}
		for _, name := range r.Tests {
			if strings.HasPrefix(name, "Test") {
				continue // of this package: the compiler would not know, TestRefused and others do
			}
			if _, ok := scripts[name]; !ok {
				data, err := os.ReadFile(filepath.Join("testdata/script", name+".txtar"))
				if err != nil {
					t.Errorf("%s %s: %v", r.Tool, r.Option, err)
				}
				scripts[name] = string(data)
			}
			used := false
			for o := range strings.SplitSeq(r.Option, ", ") {
				used = used || regexp.MustCompile(`(?m)^(exec|exits|!) .*\s`+regexp.QuoteMeta(o)+`(\s|=|$)`).MatchString(scripts[name])
			}
			if !used {
				t.Errorf("%s %s: testdata/script/%s.txtar does not use it", r.Tool, r.Option, name)
			}
		}
	}
}

// TestOwnOptionsAreUsed checks the same of the options that no peer has. Groups
// of options are shared by commands, and their test is some script that uses
// them; a Test… that is named exists somewhere in the module.
func TestOwnOptionsAreUsed(t *testing.T) {
	files, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	var scripts []byte
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		scripts = append(scripts, data...)
	}
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		for _, c := range cmd.Commands() {
			walk(c)
		}
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Hidden || f.Annotations[noteRefused] != nil || f.Annotations[noteOrigin] != nil {
				return
			}
			for _, name := range f.Annotations[noteTest] {
				if strings.HasPrefix(name, "Test") {
					if exec.CommandContext(t.Context(), "grep", "-rq", "--include=*_test.go", "func "+name+"(", "../..").Run() != nil {
						t.Errorf("%s --%s: there is no %s", cmd.CommandPath(), f.Name, name)
					}
					continue
				}
				if !slices.Contains(files, filepath.Join("testdata/script", name+".txtar")) {
					t.Errorf("%s --%s: there is no script %s", cmd.CommandPath(), f.Name, name)
				}
				option := "--" + f.Name
				if f.Shorthand != "" {
					option += "|-" + f.Shorthand
				}
				if !regexp.MustCompile(`(?m)instar .*\s(` + option + `)(\s|=|"|\)|$)`).Match(scripts) {
					t.Errorf("%s: no script uses %s", cmd.CommandPath(), option)
				}
			}
		})
	}
	walk(testRoot())
}

// TestRefused gives every refused option and command to the program, under
// the peer's name: exit status 1, and a reason that names it.
func TestRefused(t *testing.T) {
	type given struct{ tool, option string }
	var all []given
	for _, r := range optionRows(testRoot()) {
		if r.Refused == "" {
			continue
		}
		all = append(all, given{r.Tool, r.Option})
	}
	all = append(all, given{"ec2-upload-bundle", "--sigv"})
	if len(all) < 50 {
		t.Fatalf("only %d refusals", len(all))
	}
	for _, r := range all {
		args := []string{r.tool}
		name := r.tool
		if r.option != "" {
			option := r.option[strings.LastIndexByte(r.option, ' ')+1:]
			args = append(args, option, "2")
			if strings.Contains(option, "debugger") {
				args = args[:2]
			}
			if !strings.HasPrefix(r.tool, "euimage") && !slices.ContainsFunc(refusals(), func(x refusal) bool { return strings.HasSuffix(r.tool, "-"+x.name) }) {
				name = option
			}
		}
		var stdout, stderr bytes.Buffer
		code := run(args, strings.NewReader(""), &stdout, &stderr, func(string) string { return "" })
		name = strings.TrimPrefix(name, "euca-")
		if code != exitUsage || !strings.Contains(stderr.String(), name) || !strings.Contains(stderr.String(), "refused: ") || stdout.Len() > 0 {
			t.Errorf("%v: exit status %d, stdout %q, stderr %q; want 1 and the reason for refusing %s", args, code, &stdout, &stderr, name)
		}
	}
}
