package main

import (
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

const publicKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEX0n5xXGLzC5c5hTLsRzAbY2TrFwgsFUZzn2kP4yZcA me@example"

// tagsAndKeys changes tags, lists them by pages, and makes key pairs.
func (d *driver) tagsAndKeys() {
	c := d.alice.ec2
	done(d.alice, c.CreateTags, &ec2.CreateTagsInput{Resources: []string{d.id, d.source}, Tags: []types.Tag{
		{Key: aws.String("stage"), Value: aws.String("a & b = <c>")}, {Key: aws.String("team")}, {Key: aws.String("other"), Value: aws.String("+ %20")},
	}})
	done(d.alice, c.DeleteTags, &ec2.DeleteTagsInput{Resources: []string{d.id}, Tags: []types.Tag{{Key: aws.String("team"), Value: aws.String("")}, {Key: aws.String("other"), Value: aws.String("not this")}}})
	got := map[string]string{}
	for _, t := range d.alice.described(d.id).Tags {
		got[aws.ToString(t.Key)] = aws.ToString(t.Value)
	}
	if len(got) != 2 || got["stage"] != "a & b = <c>" || got["other"] != "+ %20" {
		d.fault("the tags are %q", got)
	}
	refused(d.alice, "InvalidID", c.CreateTags, &ec2.CreateTagsInput{Resources: []string{"vpc-1"}, Tags: []types.Tag{{Key: aws.String("k")}}})
	refused(d.bob, "InvalidAMIID.NotFound", d.bob.ec2.CreateTags, &ec2.CreateTagsInput{Resources: []string{d.id}, Tags: []types.Tag{{Key: aws.String("k")}}})

	made := done(d.alice, c.CreateKeyPair, &ec2.CreateKeyPairInput{KeyName: aws.String("made"), KeyType: types.KeyTypeEd25519, KeyFormat: types.KeyFormatPem, TagSpecifications: tags(types.ResourceTypeKeyPair, "k", "v")})
	if !strings.Contains(aws.ToString(made.KeyMaterial), "PRIVATE KEY-----\n") || len(made.Tags) != 1 {
		d.fault("the new key pair has no private half, or not its tag")
	}
	rsa := done(d.alice, c.CreateKeyPair, &ec2.CreateKeyPairInput{KeyName: aws.String("made too")})
	is(d, "the length of an RSA key's fingerprint", len(aws.ToString(rsa.KeyFingerprint)), 59)
	mine := done(d.alice, c.ImportKeyPair, &ec2.ImportKeyPairInput{KeyName: aws.String("imported"), PublicKeyMaterial: []byte(publicKey), TagSpecifications: tags(types.ResourceTypeKeyPair, "k", "w")})
	refused(d.alice, "InvalidKeyPair.Duplicate", c.CreateKeyPair, &ec2.CreateKeyPairInput{KeyName: aws.String("made")})
	refused(d.alice, "InvalidKey.Format", c.ImportKeyPair, &ec2.ImportKeyPairInput{KeyName: aws.String("no key"), PublicKeyMaterial: []byte("no key")})
	refused(d.alice, "InvalidParameterValue", c.CreateKeyPair, &ec2.CreateKeyPairInput{KeyName: aws.String("putty"), KeyFormat: types.KeyFormatPpk})
	if err := ec2.NewKeyPairExistsWaiter(d.alice).Wait(d.ctx, &ec2.DescribeKeyPairsInput{KeyNames: []string{"made"}}, patience); err != nil {
		d.fault("KeyPairExists: %v", err)
	}
	d.alice.waited("KeyPairExists")
	found := done(d.alice, c.DescribeKeyPairs, &ec2.DescribeKeyPairsInput{KeyPairIds: []string{aws.ToString(mine.KeyPairId)}, IncludePublicKey: aws.Bool(true), Filters: filter("tag:k", "w")})
	if len(found.KeyPairs) != 1 || !strings.HasPrefix(aws.ToString(found.KeyPairs[0].PublicKey), strings.TrimSuffix(publicKey, " me@example")) || found.KeyPairs[0].CreateTime == nil {
		d.fault("the imported key pair is %+v", found.KeyPairs)
	}
	refused(d.alice, "InvalidKeyPair.NotFound", c.DescribeKeyPairs, &ec2.DescribeKeyPairsInput{KeyNames: []string{"none"}})
	done(d.alice, c.DeleteKeyPair, &ec2.DeleteKeyPairInput{KeyPairId: rsa.KeyPairId})
	done(d.alice, c.DeleteKeyPair, &ec2.DeleteKeyPairInput{KeyName: aws.String("none")})

	pages, paged := 0, 0
	for p := ec2.NewDescribeTagsPaginator(d.alice, &ec2.DescribeTagsInput{}, func(o *ec2.DescribeTagsPaginatorOptions) { o.Limit = 5 }); p.HasMorePages(); pages++ {
		out, err := p.NextPage(d.ctx)
		if err != nil {
			d.fault("a page of tags: %v", err)
			return
		}
		paged += len(out.Tags)
	}
	whole := done(d.alice, c.DescribeTags, &ec2.DescribeTagsInput{})
	if paged != len(whole.Tags) || pages < 2 {
		d.fault("%d tags on %d pages, %d at once", paged, pages, len(whole.Tags))
	}
	is(d, "tags of key pairs", len(done(d.alice, c.DescribeTags, &ec2.DescribeTagsInput{Filters: filter("resource-type", "key-pair", "value", "?")}).Tags), 2)
	refused(d.alice, "InvalidPaginationToken", c.DescribeTags, &ec2.DescribeTagsInput{NextToken: aws.String("AAAA")})
}

// places asks where and who one is.
func (d *driver) places() {
	c := d.alice.ec2
	regions := done(d.alice, c.DescribeRegions, &ec2.DescribeRegionsInput{AllRegions: aws.Bool(true)}).Regions
	is(d, "the number of regions", len(regions), 2)
	done(d.alice, c.DescribeRegions, &ec2.DescribeRegionsInput{RegionNames: []string{d.other}, Filters: filter("region-name", "*")})
	refused(d.alice, "InvalidParameterValue", c.DescribeRegions, &ec2.DescribeRegionsInput{RegionNames: []string{"moon-1"}})
	zones := done(d.alice, c.DescribeAvailabilityZones, &ec2.DescribeAvailabilityZonesInput{AllAvailabilityZones: aws.Bool(true), Filters: filter("state", "available")}).AvailabilityZones
	if len(zones) != 1 || zones[0].State != types.AvailabilityZoneStateAvailable {
		d.fault("the zones are %+v", zones)
		return
	}
	done(d.alice, c.DescribeAvailabilityZones, &ec2.DescribeAvailabilityZonesInput{ZoneNames: []string{aws.ToString(zones[0].ZoneName)}, ZoneIds: []string{aws.ToString(zones[0].ZoneId)}})
	who := done(d.alice, d.alice.sts.GetCallerIdentity, &sts.GetCallerIdentityInput{})
	is(d, "the account", aws.ToString(who.Account), alice)
	who = done(d.temporary, d.temporary.sts.GetCallerIdentity, &sts.GetCallerIdentityInput{})
	is(d, "the account of temporary credentials", aws.ToString(who.Account), alice)
	done(d.temporary, d.temporary.ec2.DescribeRegions, &ec2.DescribeRegionsInput{})
}
