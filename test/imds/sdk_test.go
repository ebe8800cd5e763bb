package imds

func sdkMain() int { return 0 }
