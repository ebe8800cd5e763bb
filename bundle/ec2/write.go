package ec2

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"slices"
	"strconv"
	"strings"
)

// encode signs m with key and returns the document: one line in single quotes
// without white space between elements, as ec2-ami-tools writes it, whose
// verifier accepts no other layout. A nil key gives an UNSIGNED manifest. It
// sets m's Signature and the bytes it is over.
func (m *Manifest) encode(key *rsa.PrivateKey) ([]byte, error) {
	w := xmlWriter{}
	w.open("machine_configuration")
	m.writeMachine(&w)
	w.close("machine_configuration")
	w.open("image")
	m.writeImage(&w)
	w.close("image")
	m.signed, m.hasMachine = w.b, true
	signature := unsignedMark
	m.Signature = nil
	if key != nil {
		sum := sha1Sum(m.signed)
		sig, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA1, sum[:])
		if err != nil {
			return nil, &Error{Class: ErrKey, Object: objManifest, Detail: "signing", Err: err}
		}
		m.Signature, signature = sig, hex.EncodeToString(sig)
	}

	d := xmlWriter{}
	d.b = append(d.b, "<?xml version='1.0'?><manifest>"...)
	d.text("version", m.Version)
	d.open("bundler")
	d.text("name", m.Bundler.Name)
	d.text("version", m.Bundler.Version)
	d.text("release", m.Bundler.Release)
	d.close("bundler")
	d.b = append(d.b, m.signed...)
	d.text("signature", signature)
	d.close("manifest")
	return d.b, nil
}

func (m *Manifest) writeMachine(w *xmlWriter) {
	w.text("architecture", m.Arch)
	if len(m.BlockDeviceMapping) > 0 {
		sorted := slices.Clone(m.BlockDeviceMapping)
		slices.SortStableFunc(sorted, func(a, b Mapping) int { return strings.Compare(a.Virtual, b.Virtual) })
		w.open("block_device_mapping")
		for _, mp := range sorted {
			w.open("mapping")
			w.text("virtual", mp.Virtual)
			w.text("device", mp.Device)
			w.close("mapping")
		}
		w.close("block_device_mapping")
	}
	if m.KernelID != "" {
		w.text("kernel_id", m.KernelID)
	}
	if m.RamdiskID != "" {
		w.text("ramdisk_id", m.RamdiskID)
	}
	w.list("product_codes", "product_code", m.ProductCodes)
}

func (m *Manifest) writeImage(w *xmlWriter) {
	w.text("name", m.Name)
	w.text("user", m.Account)
	w.text("type", m.Type) // right after user: the cloud wants it there
	if m.KernelName != "" {
		w.text("kernel_name", m.KernelName)
	}
	w.list("ancestry", "ancestor_ami_id", m.Ancestors)
	w.text("digest", m.Digest.String(), "algorithm", "SHA1")
	w.text("size", strconv.FormatInt(m.Size, 10))
	w.text("bundled_size", strconv.FormatInt(m.BundledSize, 10))
	w.text("ec2_encrypted_key", hex.EncodeToString(m.EC2Key), "algorithm", "AES-128-CBC")
	w.text("user_encrypted_key", hex.EncodeToString(m.UserKey), "algorithm", "AES-128-CBC")
	w.text("ec2_encrypted_iv", hex.EncodeToString(m.EC2IV))
	w.text("user_encrypted_iv", hex.EncodeToString(m.UserIV))
	w.open("parts", "count", strconv.Itoa(len(m.Parts)))
	for i, part := range m.Parts {
		w.open("part", "index", strconv.Itoa(i))
		w.text("filename", part.Filename)
		w.text("digest", part.SHA1.String(), "algorithm", "SHA1")
		w.close("part")
	}
	w.close("parts")
}

type xmlWriter struct{ b []byte }

// tag begins a start tag; attributes are given as name, value, name, value.
func (w *xmlWriter) tag(name string, attrs []string) {
	w.b = append(append(w.b, '<'), name...)
	for i := 0; i+1 < len(attrs); i += 2 {
		w.b = append(append(w.b, ' '), attrs[i]...)
		w.b = append(w.b, "='"...)
		w.b = append(appendText(w.b, attrs[i+1]), '\'')
	}
}

func (w *xmlWriter) open(name string, attrs ...string) {
	w.tag(name, attrs)
	w.b = append(w.b, '>')
}

func (w *xmlWriter) close(name string) {
	w.b = append(append(append(w.b, "</"...), name...), '>')
}

func (w *xmlWriter) text(name, text string, attrs ...string) {
	w.tag(name, attrs)
	if text == "" {
		w.b = append(w.b, "/>"...)
		return
	}
	w.b = append(w.b, '>')
	w.b = appendText(w.b, text)
	w.close(name)
}

func (w *xmlWriter) list(name, each string, texts []string) {
	if len(texts) == 0 {
		return
	}
	w.open(name)
	for _, t := range texts {
		w.text(each, t)
	}
	w.close(name)
}

// check refuses what the document cannot carry, so that whatever is written
// can be read again.
func (m *Manifest) check() error {
	if err := checkFileName(m.Name); err != nil {
		return &Error{Class: ErrOption, Object: "bundle name", Err: err}
	}
	if m.Account == "" || strings.Trim(m.Account, "0123456789") != "" {
		return fail(ErrOption, "account id", "%q is not all digits", m.Account)
	}
	if m.Type != TypeMachine && m.Type != TypeKernel && m.Type != TypeRamdisk {
		return fail(ErrOption, "image type", "%q is not machine, kernel or ramdisk", m.Type)
	}
	if m.Arch == "" {
		return fail(ErrOption, "architecture", "none given")
	}
	texts := append([]string{m.Version, m.Bundler.Name, m.Bundler.Version, m.Bundler.Release, m.Arch, m.KernelID, m.RamdiskID, m.KernelName}, m.ProductCodes...)
	texts = append(texts, m.Ancestors...)
	for _, mp := range m.BlockDeviceMapping {
		if mp.Virtual == "" || mp.Device == "" {
			return fail(ErrOption, "block device mapping", "%q=%q: a name and a device are needed", mp.Virtual, mp.Device)
		}
		texts = append(texts, mp.Virtual, mp.Device)
	}
	for _, t := range texts {
		if len(t) > maxText/8 {
			return fail(ErrOption, "text", "%q is too long", shorten(t))
		}
		for _, r := range t {
			if !isChar(r) || r == '\uFFFD' {
				return fail(ErrOption, "text", "%q has characters that XML cannot carry", shorten(t))
			}
		}
	}
	return nil
}
