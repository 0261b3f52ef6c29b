"""Makes the bucket of MLFLOW_ARTIFACTS_DESTINATION in the store at MLFLOW_S3_ENDPOINT_URL."""

import os
import sys
import time
from urllib.parse import urlsplit

import boto3
from botocore.exceptions import BotoCoreError, ClientError

WAIT_SECONDS = 60

bucket = urlsplit(os.environ["MLFLOW_ARTIFACTS_DESTINATION"]).netloc
store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
deadline = time.monotonic() + WAIT_SECONDS
while True:
    try:
        if bucket not in [known["Name"] for known in store.list_buckets()["Buckets"]]:
            store.create_bucket(Bucket=bucket)
        break
    except (BotoCoreError, ClientError) as error:
        if time.monotonic() > deadline:
            sys.exit(f"bucket {bucket} could not be made: {error}")
        time.sleep(1)
