"""What the commands of data_pipelines.inspect do: lint, info, preview, bench."""
