package ec2

import (
	"errors"
	"fmt"
	"unicode/utf8"
)

// What stands within <bundler>, <machine_configuration> and <image>.

func (p *parser) bundler(e element) error {
	if len(e.attrs) > 0 {
		return p.errorf("<bundler> has attributes")
	}
	var once seen
	return p.children(e, func(c element) error {
		if err := p.once(&once, c); err != nil {
			return err
		}
		var err error
		switch b := &p.m.Bundler; c.name {
		case "name":
			b.Name, err = p.plain(c)
		case "version":
			b.Version, err = p.plain(c)
		case "release":
			b.Release, err = p.plain(c)
		default:
			return p.unknown(c)
		}
		return err
	})
}

func (p *parser) machineConfiguration(e element) error {
	if len(e.attrs) > 0 || e.empty {
		return p.errorf("<machine_configuration> with attributes or empty")
	}
	var once seen
	m := p.m
	err := p.children(e, func(c element) error {
		if err := p.once(&once, c); err != nil {
			return err
		}
		var err error
		switch c.name {
		case "architecture":
			m.Arch, err = p.plain(c)
		case "block_device_mapping":
			err = p.mappings(c, "mapping")
		case "block_device_mappings": // as euca2ools reads, though nobody writes it
			err = p.mappings(c, "block_device_mapping")
		case "kernel_id":
			m.KernelID, err = p.plain(c)
		case "ramdisk_id":
			m.RamdiskID, err = p.plain(c)
		case "product_codes":
			m.ProductCodes, err = p.list(c, "product_code")
		case "productcodes": // the same
			m.ProductCodes, err = p.list(c, "product_code")
		default:
			return p.unknown(c)
		}
		return err
	})
	if err != nil {
		return err
	}
	if once.names["block_device_mapping"] && once.names["block_device_mappings"] || once.names["product_codes"] && once.names["productcodes"] {
		return p.errorf("block device mapping or product codes under two names")
	}
	if m.Arch == "" {
		return p.errorf("no <architecture>")
	}
	return nil
}

func (p *parser) mappings(e element, name string) error {
	if len(e.attrs) > 0 {
		return p.errorf("<%s> has attributes", e.name)
	}
	return p.children(e, func(c element) error {
		if c.name != name || len(c.attrs) > 0 {
			return p.unknown(c)
		}
		var once seen
		var mp Mapping
		err := p.children(c, func(f element) error {
			if err := p.once(&once, f); err != nil {
				return err
			}
			var err error
			switch f.name {
			case "virtual":
				mp.Virtual, err = p.plain(f)
			case "device":
				mp.Device, err = p.plain(f)
			default:
				return p.unknown(f)
			}
			return err
		})
		if err != nil {
			return err
		}
		if mp.Virtual == "" {
			return p.errorf("a mapping without <virtual>")
		}
		if p.m.BlockDeviceMapping = append(p.m.BlockDeviceMapping, mp); len(p.m.BlockDeviceMapping) > maxList {
			return p.tooMany(e)
		}
		return nil
	})
}

func (p *parser) imageElement(e element) error {
	if len(e.attrs) > 0 || e.empty {
		return p.errorf("<image> with attributes or empty")
	}
	var once seen
	m := p.m
	err := p.children(e, func(c element) error {
		if err := p.once(&once, c); err != nil {
			return err
		}
		return p.imageField(c)
	})
	if err != nil {
		return err
	}
	for _, must := range []string{"name", "user", "digest", "size", "bundled_size", "ec2_encrypted_key", "ec2_encrypted_iv", "user_encrypted_key", "user_encrypted_iv", "parts"} {
		if !once.names[must] {
			return p.errorf("<image> has no <%s>", must)
		}
	}
	if m.Type == "" {
		m.Type = TypeMachine
	}
	if err := checkFileName(m.Name); err != nil {
		return p.errorf("name: %v", err)
	}
	if len(m.EC2Key) == 0 && len(m.UserKey) == 0 {
		return p.errorf("neither the cloud's nor the user's encrypted key")
	}
	return nil
}

func (p *parser) imageField(c element) (err error) {
	m := p.m
	var text string
	switch c.name {
	case "name":
		m.Name, err = p.plain(c)
	case "user":
		m.Account, err = p.plain(c)
	case "type":
		m.Type, err = p.plain(c)
		if err == nil && m.Type != TypeMachine && m.Type != TypeKernel && m.Type != TypeRamdisk {
			return p.errorf("type %q is not machine, kernel or ramdisk", shorten(m.Type))
		}
	case "kernel_name":
		m.KernelName, err = p.plain(c)
	case "ancestry":
		m.Ancestors, err = p.list(c, "ancestor_ami_id")
	case "digest":
		m.Digest, err = p.sha1(c)
	case "size":
		if text, err = p.plain(c); err == nil {
			m.Size, err = p.number(text, "size")
		}
	case "bundled_size":
		if text, err = p.plain(c); err == nil {
			m.BundledSize, err = p.number(text, "bundled size")
		}
	case "ec2_encrypted_key", "user_encrypted_key":
		if text, err = p.withAttr(c, "algorithm", "AES-128-CBC"); err != nil {
			return err
		}
		to := &m.EC2Key
		if c.name == "user_encrypted_key" {
			to = &m.UserKey
		}
		*to, err = p.hex(text, c.name)
	case "ec2_encrypted_iv":
		if text, err = p.plain(c); err == nil {
			m.EC2IV, err = p.hex(text, c.name)
		}
	case "user_encrypted_iv":
		if text, err = p.plain(c); err == nil {
			m.UserIV, err = p.hex(text, c.name)
		}
	case "parts":
		err = p.parts(c)
	default:
		return p.unknown(c)
	}
	return err
}

// parts reads the parts, which must be numbered without gap from 0 in order,
// be as many as count says, and have names that differ.
func (p *parser) parts(e element) error {
	if len(e.attrs) != 1 || e.attrs[0].name != "count" {
		return p.errorf("<parts> without count")
	}
	count, err := p.number(e.attrs[0].value, "count of parts")
	if err != nil {
		return err
	}
	names := make(map[string]bool)
	err = p.children(e, func(c element) error {
		if c.name != "part" {
			return p.unknown(c)
		}
		if len(c.attrs) != 1 || c.attrs[0].name != "index" {
			return p.errorf("<part> without index")
		}
		index, err := p.number(c.attrs[0].value, "index of a part")
		if err != nil {
			return err
		}
		if index != int64(len(p.m.Parts)) {
			return p.errorf("part %d where part %d is due", index, len(p.m.Parts))
		}
		part, err := p.part(c)
		if err != nil {
			return err
		}
		if names[part.Filename] {
			return p.errorf("file name %q a second time", part.Filename)
		}
		names[part.Filename] = true
		p.m.Parts = append(p.m.Parts, part)
		return nil
	})
	if err != nil {
		return err
	}
	if count != int64(len(p.m.Parts)) {
		return p.errorf("%d parts where their count says %d", len(p.m.Parts), count)
	}
	if count == 0 {
		return p.errorf("no parts")
	}
	return nil
}

func (p *parser) part(e element) (part ManifestPart, err error) {
	var once seen
	err = p.children(e, func(c element) error {
		if err := p.once(&once, c); err != nil {
			return err
		}
		var err error
		switch c.name {
		case "filename":
			part.Filename, err = p.plain(c)
		case "digest":
			part.SHA1, err = p.sha1(c)
		default:
			return p.unknown(c)
		}
		return err
	})
	if err != nil {
		return part, err
	}
	if !once.names["digest"] {
		return part, p.errorf("a part without <digest>")
	}
	if err := checkFileName(part.Filename); err != nil {
		return part, p.errorf("file name of a part: %v", err)
	}
	return part, nil
}

// checkFileName makes sure that name names a file right where it is looked
// for, and nothing else: it becomes a path or an object's key.
func checkFileName(name string) error {
	switch {
	case name == "":
		return errors.New("is empty")
	case len(name) > 255:
		return errors.New("is longer than 255 bytes")
	case name == "." || name == "..":
		return fmt.Errorf("%q names a directory", name)
	case !utf8.ValidString(name):
		return fmt.Errorf("%q is not UTF-8", name)
	}
	for _, r := range name {
		if r == '/' || !isChar(r) || r == '\n' || r == '\t' {
			return fmt.Errorf("%q contains %q", name, r)
		}
	}
	return nil
}
