package imds

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
)

// sdkMain is the AWS SDK for Go as a client: it prints what it finds as JSON.
// It falls back on nothing: a token that cannot be had is an error.
func sdkMain() int {
	out, err := askSDK()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := json.NewEncoder(os.Stdout).Encode(out); err != nil {
		return 1
	}
	return 0
}

func askSDK() (map[string]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	mode := imds.EndpointModeStateIPv4
	if os.Getenv("INSTAR_TEST_SDK") == "IPv6" {
		mode = imds.EndpointModeStateIPv6
	}
	c := imds.New(imds.Options{EnableFallback: aws.FalseTernary, EndpointMode: mode})
	out := make(map[string]string)
	doc, err := c.GetInstanceIdentityDocument(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("identity document: %w", err)
	}
	out["instance"], out["zone"] = doc.InstanceID, doc.AvailabilityZone
	region, err := c.GetRegion(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("region: %w", err)
	}
	out["region"] = region.Region
	info, err := c.GetIAMInfo(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("IAM info: %w", err)
	}
	out["profile"] = info.InstanceProfileArn
	for name, path := range map[string]string{"hostname": "hostname", "mac": "mac"} {
		md, err := c.GetMetadata(ctx, &imds.GetMetadataInput{Path: path})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		b, err := io.ReadAll(md.Content)
		if err != nil {
			return nil, err
		}
		out[name] = string(b)
	}
	ud, err := c.GetUserData(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("user data: %w", err)
	}
	b, err := io.ReadAll(ud.Content)
	if err != nil {
		return nil, err
	}
	out["user-data"] = string(b)
	// And the default chain, which finds role and region by itself.
	cfg, err := config.LoadDefaultConfig(ctx, config.WithEC2IMDSRegion(), config.WithEC2IMDSClientEnableState(imds.ClientEnabled))
	if err != nil {
		return nil, fmt.Errorf("default configuration: %w", err)
	}
	keys, err := cfg.Credentials.Retrieve(ctx)
	if err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	out["key"], out["chain-region"] = keys.AccessKeyID, cfg.Region
	return out, nil
}
